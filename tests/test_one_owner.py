"""Every command that writes a folder refuses one that another process writes, and touches nothing in it."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.sharding.staging import Plan, ShardSettings
from dga_scale.corpus.tokenizer import load_tokenizer, tokenizer_hash
from dga_scale.endtasks.cli import finetune, forgetting
from dga_scale.endtasks.evaluate_cli import main as evaluate
from dga_scale.errors import UserError
from dga_scale.merging.cli import main as merge
from dga_scale.storage.lock import owned, owned_output, token_in
from dga_scale.train import cli
from dga_scale.vocabulary.cli import main as extend
from tests.helpers.small import SmallWorld
from tests.helpers.tiny_tasks import write_task


def refused(command: Callable[[], object], folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{folder.name}: process {os.getpid()} on .* is writing here"):
        command()


def test_commands_that_fill_a_folder(world: SmallWorld, tmp_path: Path) -> None:
    output, run = tmp_path / "output", tmp_path / "run"
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"domain_corpora: [{world.corpus}]\n")
    model, task = str(world.model), str(write_task(tmp_path / "task"))
    for stage in ("1-a", "2-b"):
        (run / stage / "model").mkdir(parents=True)
    commands = {
        output: [
            partial(finetune, ["--model", model, "--task", task, "--output_dir", str(output)]),
            partial(
                evaluate,
                [
                    "--base",
                    model,
                    "--model",
                    f"x={model}",
                    "--suite",
                    str(suite),
                    "--output_dir",
                    str(output),
                ],
            ),
        ],
        run / "forgetting": [partial(forgetting, [str(run), "--task", f"a={task}", f"b={task}"])],
    }
    for folder, calls in commands.items():
        for call in calls:
            with owned(folder):
                before = sorted(tmp_path.rglob("*"))
                refused(call, folder)
                assert sorted(tmp_path.rglob("*")) == before


def test_commands_that_make_a_new_folder(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = tmp_path.with_name("terms")
    terms.write_text("riverbank\n")
    output, models = tmp_path / "output", ["--base", str(world.model), "--model", str(world.model)]
    corpora = ["--corpus", str(world.corpus), "--general_corpus", str(world.general_corpus)]

    def consolidate() -> None:
        monkeypatch.setattr("sys.argv", ["dga-consolidate", str(tmp_path), "--output", str(output)])
        monkeypatch.setattr(cli, "run_main", lambda main: main())
        cli.consolidate_command()

    for command in (
        partial(merge, [*models, "--output", str(output)]),
        partial(extend, ["--model", str(world.model), "--terms", str(terms), "--output", str(output)]),
        partial(merge, [*models, *corpora, "--sweep", "0,1", "--results", str(output)]),
        consolidate,
    ):
        with owned_output(output):
            refused(command, output)
        assert list(tmp_path.iterdir()) == []


def test_sharding_is_shared_by_array_tasks_of_the_same_work_only(world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    flags = [
        str(world.general_text), "--output", str(output), "--tokenizer", str(world.model),
        "--sequence_length", "32",
    ]  # fmt: skip
    task = [*flags, "--array_task", "0/2", "--array_task_patience", "0"]
    with owned(output):
        for words in (flags, task):
            refused(partial(shard, words), output)
    assert not output.exists()
    settings = ShardSettings(
        str(world.model), sequence_length=32, tokenizer_hash=tokenizer_hash(load_tokenizer(str(world.model)))
    )
    plan = Plan.make([str(world.general_text)], settings)
    with owned(output, group=plan.name):  # the other task
        for words in (flags, [*task, "--seed", "1"]):
            refused(partial(shard, words), output)
        assert shard(task) == 0
        assert token_in(output) == plan.name
    assert (output / "manifest.json").exists()
    assert token_in(output) is None
