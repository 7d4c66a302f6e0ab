"""A path that a flag gives and that can't be used is refused with that flag, the path and a fix, once each.

A command's path flags are read off its parser: one that is added has to find its line in ``CASES``.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dga_scale.config.arguments import Parser, PathText
from dga_scale.config.methods import known_settings
from dga_scale.errors import GivenPath, UserError, naming_flags
from dga_scale.launch.world import single_process
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld
from tests.helpers.tiny_tasks import write_task

ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")


@dataclass(frozen=True)
class Places:
    """What a command line of these tests is made of."""

    world: SmallWorld
    root: Path
    """A folder with a task, a suite, and a run that can be reported."""
    missing: str
    """A path at which there is nothing."""
    blocked: str
    """A path at which there can be nothing, because a file is above it."""


@pytest.fixture
def places(world: SmallWorld, tmp_path: Path) -> Places:
    write_task(tmp_path / "task")
    (tmp_path / "suite.yaml").write_text(f"general_corpora: {world.general_corpus}\n")
    (tmp_path / "terms").write_text("river town\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("method: mlm\nmax_steps: 1\n")
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss/lm": 2.0}) + "\n")
    (tmp_path / "file").write_text("")
    return Places(world, tmp_path, str(tmp_path / "nowhere"), str(tmp_path / "file" / "inside"))


def shard(p: Places) -> list[str]:
    words = [str(p.world.domain_text), "--tokenizer", str(p.world.model), "--output", str(p.root / "new")]
    return [*words, "--sequence_length", "32"]


def train(p: Places) -> list[str]:
    return [
        "--ds_config", ZERO2, "--model", str(p.world.model), "--corpus", str(p.world.corpus),
        "--output_dir", str(p.root / "new"), "--max_steps", "1", "--global_batch_size", "8",
        "--heartbeat_timeout", "0",
    ]  # fmt: skip


def evaluate(p: Places) -> list[str]:
    model = str(p.world.model)
    return [
        "--base", model, "--model", f"new={model}", "--suite", str(p.root / "suite.yaml"),
        "--output_dir", str(p.root / "new"),
    ]  # fmt: skip


def finetune(p: Places) -> list[str]:
    return [
        "--model", str(p.world.model), "--task", str(p.root / "task"), "--output_dir", str(p.root / "new"),
        "--seeds", "1", "--epochs", "1",
    ]  # fmt: skip


def forgetting(p: Places) -> list[str]:
    return [str(p.root / "run"), "--task", f"acl={p.root / 'task'}"]


def merge(p: Places) -> list[str]:
    model = str(p.world.model)
    return ["--base", model, "--model", model, "--output", str(p.root / "new")]


def extend(p: Places) -> list[str]:
    return ["--model", str(p.world.model), "--terms", str(p.root / "terms"), "--output", str(p.root / "new")]


def sweep(p: Places) -> list[str]:
    corpora = ["--corpus", str(p.world.corpus), "--general_corpus", str(p.world.general_corpus)]
    return [*merge(p)[:-2], "--sweep", "0", *corpora, "--max_eval_samples", "4"]


def consistency(p: Places) -> list[str]:
    return ["--model", str(p.world.model), "--corpus", str(p.world.corpus), "--rows", "2"]


def report(p: Places) -> list[str]:
    return [str(p.root / "run"), "--output", str(p.root / "report.html")]


def plan(p: Places) -> list[str]:
    return ["--gpus", "8", "--gpu", "h100", "--ds_config", ZERO2, "--model", str(p.world.model)]


def submit(stage: str, line: Callable[[Places], list[str]]) -> Callable[[Places], list[str]]:
    environment = Path(sys.executable).parent.parent
    return lambda p: ["--dry_run", "--venv", str(environment), stage, *line(p)]


CASES: list[tuple[str, Callable[[Places], list[str]], str]] = [
    *(("dga-shard", shard, flag) for flag in ("INPUT", "--tokenizer", "--output", "--exclude")),
    *(("dga-train", train, flag) for flag in (
        "--config", "--ds_config", "--model", "--corpus", "--mix", "--eval_corpus", "--general_eval_corpus",
        "--also_evaluate", "--output_dir", "--resume", "--method ewc --general_corpus",
        "--method das --prior_importance", "--import")),
    *(("dga-evaluate", evaluate, flag) for flag in ("--base", "--model", "--suite", "--output_dir")),
    *(("dga-finetune", finetune, flag) for flag in ("--model", "--task", "--output_dir")),
    *(("dga-forgetting", forgetting, flag) for flag in ("RUN", "--task")),
    *(("dga-merge", merge, flag) for flag in ("--base", "--model", "--output")),
    *(("dga-extend-vocabulary", extend, flag) for flag in ("--model", "--terms", "--output")),
    *(("dga-merge", sweep, flag) for flag in ("--corpus", "--general_corpus", "--results")),
    *(("dga-consistency", consistency, flag) for flag in ("--model", "--corpus", "--output")),
    *(("dga-report", report, flag) for flag in ("RUN", "--output", "--figures", "--evaluation")),
    *(("dga-plan", plan, flag) for flag in ("--model", "--ds_config", "--gpu", "--config")),
    *(("dga-submit", submit("shard", shard), flag) for flag in (
        "INPUT", "--tokenizer", "--exclude", "--mounts", "--container", "--venv")),
    *(("dga-submit", submit("train", train), flag) for flag in (
        "--config", "--ds_config", "--model", "--corpus", "--mix", "--eval_corpus", "--general_eval_corpus",
        "--also_evaluate", "--output_dir", "--method ewc --general_corpus")),
    *(("dga-submit", submit("evaluate", evaluate), flag) for flag in ("--base", "--model", "--suite")),
    ("dga-consolidate", lambda p: [p.missing, "--output", str(p.root / "new")], "RUN"),
]  # fmt: skip
OUTPUTS = {"--output", "--output_dir", "--results", "--figures"}
ELSEWHERE = {("dga-consolidate", "--output")}
"""Flags that need a checkpoint first; ``new_folder`` refuses them, as ``dga-merge --output``."""
FORMS = {"--mix": "{}:0.1", "--also_evaluate": "acl={}", "--task": "acl={}", "--gpu": "{}.yaml"}
SETUP = {"--container": ["--container", "{}.sif"], "--mounts": ["--container", "image", "--mounts", "{}"]}


def run_command(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to stderr."""
    (entry,) = metadata.entry_points(group="console_scripts", name=command)
    main = entry.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *words])
        patch.setattr("dga_scale.train.cli.end_rank", sys.exit)
        patch.setattr("dga_scale.launch.world.join_cluster", lambda: contextlib.nullcontext(single_process()))
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), capsys.readouterr().err


def spoilt(command: str, line: list[str], flag: str, places: Places) -> tuple[list[str], str]:
    """Return a command line in which the flag gives a path that can't be used, and the text it gives."""
    *before, name = flag.split()
    path = places.blocked if name in OUTPUTS else places.missing
    form = "{}" if (command, name) == ("dga-finetune", "--task") else FORMS.get(name, "{}")
    text = form.format(path)
    if name.isupper():  # the first word that is no option, or behind the name of the stage
        at = line.index("shard") + 1 if command == "dga-submit" else 0
        return [*line[:at], text, *line[at + 1 :]], text
    if name in SETUP:
        words = [word.format(path) for word in SETUP[name]]
        unset = line.index("--venv")
        return [*words, *line[:unset], *line[unset + 2 :]], words[-1]
    words = list(line)
    if name in words:
        words[words.index(name) + 1] = text
    else:
        words += [*before, name, text]
    return words, text


@pytest.mark.parametrize(
    ("command", "line", "flag"), CASES, ids=lambda case: case if type(case) is str else ""
)
def test_the_refusal_of_a_path_names_its_flag(
    command: str,
    line: Callable[[Places], list[str]],
    flag: str,
    places: Places,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, text = spoilt(command, line(places), flag, places)
    code, err = run_command(command, words, capsys)
    name = flag.split()[-1]
    (said,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert code == 2
    assert re.match(rf"error: (\w+: )?{name} {re.escape(text)}[: ]", said), said
    assert len(re.findall(rf"(?<![\w-]){name}\b", said)) == 1, said
    assert said.count(text) == 1, said
    assert re.search(r"\. [A-Z]\w+ ", said), f"no fix: {said}"


def path_flags_of(command: str) -> set[str]:
    """Read the path flags off the command's parser."""
    if command == "dga-train":
        return {f"--{each.name}" for each in known_settings().values() if each.refers}
    if command in ("dga-plan", "dga-submit"):  # they pass their other flags on to those above
        return set()
    found: set[str] = set()

    def note(parser: Parser, *_: Any) -> int:
        for action in parser._actions:
            if action.type in (Path, PathText):
                found.add(action.option_strings[-1] if action.option_strings else str(action.metavar))
        return 0

    (entry,) = metadata.entry_points(group="console_scripts", name=command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "run", note)
        patch.setattr(sys, "argv", [command])
        with pytest.raises(SystemExit):
            entry.load()()
    return found


COMMANDS = sorted({command for command, _, _ in CASES})


def test_every_command_is_tried() -> None:
    installed = {entry.name for entry in metadata.entry_points(group="console_scripts")}
    assert {name for name in installed if name.startswith("dga-")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_flag_is_tried(command: str) -> None:
    tried = {flag.split()[-1] for other, _, flag in CASES if other == command}
    elsewhere = {flag for other, flag in ELSEWHERE if other == command}
    assert path_flags_of(command) - tried - elsewhere == set()


def refusal(problem: str, path: str, *given: tuple[str, str, str]) -> str:
    with pytest.raises(UserError) as caught, naming_flags(GivenPath(*each) for each in given):
        raise UserError(problem, path)
    return str(caught.value)


def test_the_flag_of_the_innermost_folder() -> None:
    corpus = ("--corpus", "corpora/acl/", "corpora/acl/")
    held_out = ("--eval_corpus", "corpora/acl/validation", "corpora/acl/validation")
    assert refusal("damaged", "corpora/acl/manifest.json", corpus, held_out) == (
        "--corpus corpora/acl/: manifest.json: damaged"
    )
    assert refusal("empty", "corpora/acl/validation", corpus) == "--corpus corpora/acl/: validation: empty"
    assert refusal("empty", "corpora/acl/validation", corpus, held_out) == (
        "--eval_corpus corpora/acl/validation: empty"
    )
    assert refusal("empty", "corpora/acl-2", corpus) == "corpora/acl-2: empty"


def test_an_address_is_kept_as_it_is() -> None:
    """Passwords are blanked out by the address's form."""
    address = "https://joe:password@example.com/model"
    assert UserError("no such folder", UserError("", address).path).args == (f"{address}: no such folder",)
    assert refusal("no such folder", address, ("--model", address, address)).startswith(f"--model {address}:")


def test_two_flags_that_gave_one_path() -> None:
    both = (("--base", "m", "m"), ("--model", "new=m", "m"))
    assert refusal("no such folder", "m", *both) == "--base, --model m: no such folder"


def test_a_suite_names_the_key(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    empty = places.root / "empty"
    empty.mkdir()
    suite = places.root / "suite.yaml"
    suite.write_text(f"general_corpora: {empty}\n")
    _, err = run_command("dga-evaluate", evaluate(places), capsys)
    assert f"error: {suite}: general_corpora: {empty}: no corpus in it" in err
