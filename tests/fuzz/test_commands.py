"""Every option of every other command, with values that it can't have, before any work begins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_scale.corpus.cli import shard_command
from dga_scale.endtasks.cli import finetune_command, forgetting_command
from dga_scale.endtasks.evaluate_cli import evaluate_command
from dga_scale.merging.cli import merge_command
from dga_scale.planning.cli import plan_command
from dga_scale.report.cli import report_command
from dga_scale.report.consistency import consistency_command
from dga_scale.slurm.cli import submit_command
from dga_scale.train.cli import consolidate_command
from tests.helpers.nonsense import NUMBERS, answer, fuzz
from tests.helpers.small import SmallWorld

COUNT = (*NUMBERS, "", "x", "0", "-1", "1.5", "1e3", "true", "[]", "1,2", "\u0661", "1_0", str(10**30))
SHARE = (*NUMBERS, "", "x", "-0.1", "1.5", "true", "[]", "0,5", "\u0661")
PATH = ("", "no/such/folder", "x" * 300, "\udcff", "no\nsuch\x1b[31m")
CHOICE = ("", "x", "1", "chunk,", "\udcff")

Options = dict[str, tuple[str, ...]]


def shard(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [
        str(world.domain_text),
        f"--tokenizer={world.model}",
        f"--output={root / 'out'}",
        "--num_workers=1",
    ]
    return right, {
        "--sequence_length": COUNT, "--packing": CHOICE, "--document": CHOICE, "--validation_share": SHARE,
        "--exclude": PATH, "--on_bad_record": CHOICE, "--max_document_mb": SHARE[:-4],
        "--shard_size": SHARE[:-4],
        "--seed": COUNT[:-2], "--num_workers": COUNT, "--array_task": (*COUNT, "1/1", "-1/2", "3/2", "1/x"),
        "--array_task_patience": SHARE[:-4], "--tokenizer": PATH,
    }  # fmt: skip


def task_options() -> Options:
    return {
        **dict.fromkeys(("--seeds", "--jobs", "--epochs", "--batch_size"), COUNT),
        **dict.fromkeys(("--patience", "--max_length"), COUNT),
        **dict.fromkeys(("--max_train_examples", "--max_dev_examples", "--max_test_examples"), COUNT[:-1]),
        "--learning_rate": (*NUMBERS, "", "x", "-1", "0"), "--weight_decay": (*NUMBERS, "", "x", "-1"),
        "--metric": CHOICE, "--precision": CHOICE,
    }  # fmt: skip


def finetune(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [f"--model={world.model}", f"--task={root / 'task'}", f"--output_dir={root / 'scores'}"]
    return right, task_options() | {"--task": PATH, "--split": CHOICE}


def forgetting(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    return [str(root / "run"), f"--task=a={root / 'task'}"], task_options() | {"--task": (*PATH, "a=", "=b")}


def evaluate(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [f"--base={world.model}", f"--model={world.model}", f"--suite={root / 'suite.yaml'}",
             f"--output_dir={root / 'evaluation'}"]  # fmt: skip
    return right, {"--base": PATH, "--model": (*PATH, "a=", "=b"), "--suite": PATH}


def merge(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [f"--base={world.model}", f"--model={world.model}", f"--output={root / 'merged'}"]
    return right, {
        "--method": CHOICE, "--weight": SHARE, "--density": (*SHARE, "0"),
        "--sweep": (*SHARE, "0,", "0,nan", "2"),
        "--batch_size": COUNT, "--max_eval_samples": COUNT, "--base": PATH, "--model": PATH,
    }  # fmt: skip


def plan(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [f"--model={world.model}", "--gpus=2", "--gpu=h100", f"--ds_config={root / 'ds.json'}"]
    return right, {
        "--gpus": COUNT, "--gpus_per_node": COUNT, "--gpu": PATH, "--mfu": (*SHARE, "0"),
        "--sequence_length": COUNT, "--max_steps": COUNT, "--ds_config": PATH, "--model": PATH,
    }  # fmt: skip


def report(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    return [str(root), f"--output={root / 'report.html'}"], {"--evaluation": PATH}


def consistency(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = [f"--model={world.model}", f"--corpus={world.corpus}", f"--output={root / 'consistency'}"]
    return right, {
        "--layer": (*NUMBERS, "", "x", "1.5", "99", "-99", str(10**30)), "--rows": (*COUNT, "1"),
        "--mlm_probability": (*SHARE, "0"), "--corpus": PATH, "--model": PATH,
    }  # fmt: skip


def consolidate(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    return [str(root / "run"), f"--output={root / 'model'}"], {"--step": (*COUNT, "3")}


def submit(world: SmallWorld, root: Path) -> tuple[list[str], Options]:
    right = ["--dry_run", "train", f"--model={world.model}", f"--corpus={world.corpus}",
             f"--ds_config={root / 'ds.json'}", f"--output_dir={root / 'out'}",
             "--container=image"]  # fmt: skip
    return right, {
        "--nodes": COUNT, "--gpus_per_node": ("", "x", "-1", "1.5", "h100:", ":3"), "--cpus_per_task": COUNT,
        "--time": ("", "x", "1:2:3:4", "-1", *NUMBERS[:5]), "--account": ("", "a b", "a\nb", "a;b"),
        "--partition": ("", "a b", "a\nb"), "--qos": ("", "a b"), "--job_name": ("", "a b", "a\nb"),
        "--logs": ("", "a\nb", "a%b"), "--mounts": PATH, "--venv": PATH, "--sbatch": ("", "--x=1", "a\nb"),
        "--seeds": ("", "x", "5-1", "-1", "1-", "\u0661", "0-99999999999", "1_0", *NUMBERS[:5]),
        "--stop_minutes": (*NUMBERS, "", "x", "-0.1", "0"),
    }  # fmt: skip


COMMANDS: dict[Callable[[], Any], Callable[[SmallWorld, Path], tuple[list[str], Options]]] = {
    shard_command: shard,
    finetune_command: finetune,
    forgetting_command: forgetting,
    evaluate_command: evaluate,
    merge_command: merge,
    plan_command: plan,
    report_command: report,
    consistency_command: consistency,
    consolidate_command: consolidate,
    submit_command: submit,
}


@pytest.fixture(scope="module")
def root(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "task").mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"text": f"word {n}", "label": "ab"[n % 2]}) for n in range(6)]
        (folder / "task" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "ds.json").write_text("{}")
    (folder / "suite.yaml").write_text(f"domain_tasks: [{folder / 'task'}]\n")
    for stage in ("1-a", "2-b"):
        (folder / "run" / stage / "model").mkdir(parents=True)
    return folder


def cases(world: SmallWorld, root: Path) -> list[tuple[Callable[[], Any], list[str]]]:
    found = []
    for command, make in COMMANDS.items():
        right, options = make(world, root)
        for flag, values in options.items():
            kept = [word for word in right if word.split("=")[0] != flag]
            found += [(command, [*kept[:-1], *kept[-1:], f"{flag}={value}"]) for value in values]
    return found


@fuzz(300)
@given(data=st.data())
def test_options(data: st.DataObject, world: SmallWorld, root: Path) -> None:
    command, arguments = data.draw(st.sampled_from(cases(world, root)))
    code, said = answer(command, arguments)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, (arguments, said)
    assert len(errors) == 1, said
    assert errors[0].isprintable()
