"""Commands that are killed and given again: each ends as if nothing had happened.

``tests/test_kills.py`` strikes some moments of each command, ``benchmarks/kill_commands.py`` every one: just
before each call that changes its folder, and in the middle of writing each of its files.
"""

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from datasets import DatasetDict, load_dataset
from transformers import AutoModelForMaskedLM

# Imported here, and so in the template that the commands are forked from.
import dga_scale.corpus.cli
import dga_scale.endtasks.cli
import dga_scale.endtasks.evaluate
import dga_scale.endtasks.evaluate_cli
import dga_scale.endtasks.forgetting
import dga_scale.endtasks.seeds
import dga_scale.merging.cli
import dga_scale.merging.sweep
import dga_scale.report.cli
import dga_scale.report.consistency
import dga_scale.report.report
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import run_main
from dga_scale.quickstart import prepare
from dga_scale.quickstart.text import Document
from tests.helpers.forks import Launch, launch
from tests.helpers.kills import COUNTS, DEATHS, Fault, arm
from tests.helpers.pictures import no_pictures
from tests.helpers.small import DOMAIN, GENERAL, write_text
from tests.helpers.tiny_tasks import tiny_model, write_task

Content = dict[str, bytes | str | None]
"""By path: a file's content without its times, what a link names, None for a folder."""


@dataclass(frozen=True)
class Command:
    """A command that makes files in the folder where it is given."""

    name: str
    function: str
    """``module:function``, called without arguments or with them."""
    arguments: tuple[str, ...] = ()
    copies: tuple[tuple[str, Path], ...] = ()
    """Folders that lie in the folder before, under these names."""
    finished: tuple[str, ...] = ()
    """Patterns of files that are finished once they are there: the command given again leaves them alone."""
    pictures: bool = True
    """Whether pictures are drawn; their bytes are made up otherwise."""


@dataclass
class KilledCommand:
    """One command, killed in folders below ``root``."""

    command: Command
    root: Path
    calls: int = 0
    """The calls of an undisturbed command that change its folder."""
    reference: Content = field(default_factory=dict)
    """What an undisturbed command makes."""

    def measure(self) -> None:
        """Give the command once without a fault."""
        folder = self._new_folder()
        launched = self._launch(folder, None)
        assert launched.wait(300) == [0], launched.output(0)
        found = re.search(COUNTS, launched.output(0))
        assert found is not None
        self.calls = int(found[1])
        self.reference = content(folder)
        assert not any(name.endswith((".tmp", ".old", ".partial")) for name in self.reference)
        shutil.rmtree(folder)

    def faults(self) -> list[Fault]:
        """List a fault before each call, and several of each file: at its start, half written, at its end."""
        sizes = {len(each) for each in self.reference.values() if isinstance(each, bytes)}
        limits = sorted({limit for size in sizes for limit in (1, size // 2, size - 1) if limit > 0})
        calls = [Fault("call", 0, number) for number in range(1, self.calls + 1)]
        return calls + [Fault("bytes", 0, limit) for limit in limits]

    def survive(self, faults: Iterable[Fault]) -> int:
        """Kill the command by one fault after another in one folder, and then let it end.

        Returns:
            How many faults struck; the others would have come after its end.

        Raises:
            AssertionError: What the command has made is not what an undisturbed one makes, or a file with its
                own name was a part of that in between.
        """
        folder, struck = self._new_folder(), 0
        for fault in (*faults, None):
            if struck and {n: c for n, c in content(folder).items() if ".lock" not in n} == self.reference:
                break  # it was killed with all done
            before = self._finished(folder)
            launched = self._launch(folder, fault)
            (code,) = launched.wait(300)
            said = launched.output(0)
            after = self._finished(folder)
            assert {name: after.get(name) for name in before} == before, f"{fault}: done again\n{said}"
            # A worker that is killed ends the command with a line of its own.
            killed = code in DEATHS or (code == 2 and "worker process was killed" in said)
            assert killed if code else True, f"{fault}: exit code {code}\n{said}"
            if not killed:
                break
            struck += 1
            torn = [n for n, c in content(folder).items() if self.reference.get(n, c) != c]
            assert not torn, f"{fault} left a part of {torn}"
        left = content(folder)
        differing = [n for n in {**left, **self.reference} if left.get(n, "") != self.reference.get(n, "")]
        assert not differing, f"{differing} after {list(faults)}\n{said}"
        shutil.rmtree(folder)
        return struck

    def _new_folder(self) -> Path:
        folder = self.root / self.command.name  # the same name each time: it stands in some of the files
        folder.mkdir(parents=True)
        for name, source in self.command.copies:
            shutil.copytree(source, folder / name)
        return folder

    def _launch(self, folder: Path, fault: Fault | None) -> Launch:
        command = self.command
        return launch(1, program, command.function, command.arguments, command.pictures, folder, fault)

    def _finished(self, folder: Path) -> dict[Path, tuple[int, int]]:
        paths = [path for pattern in self.command.finished for path in folder.glob(pattern)]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def content(folder: Path) -> Content:
    """Read all that is in a folder."""
    found: Content = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = _without_times(path)
    return found


def _without_times(path: Path) -> bytes:
    text = path.read_bytes()
    try:
        values = json.loads(text) if path.suffix == ".json" else None
    except ValueError:  # torn
        return text
    if not isinstance(values, dict):
        return text
    for name in ("seconds", "sources", "checksum"):  # a corpus names its sources with their files' times
        values.pop(name, None)
    return json.dumps(values).encode()


def program(
    function: str, arguments: tuple[str, ...], pictures: bool, folder: Path, fault: Fault | None
) -> None:
    """Give a command in ``folder``, under a fault."""
    os.chdir(folder)
    counts = arm(folder, fault)
    module, _, name = function.partition(":")
    call: Callable[[], int] = getattr(importlib.import_module(module), name)
    sys.argv = [name, *arguments]
    try:
        with nullcontext() if pictures else no_pictures():
            run_main(call)
    finally:
        print(counts, flush=True)


# --- the commands ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommandWorld:
    """What the commands read: models, corpora of two domains, a task, a suite; a finished run."""

    root: Path
    run: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapted(self) -> Path:
        return self.root / "adapted"

    @property
    def task(self) -> Path:
        return self.root / "intent"

    @property
    def dataset(self) -> Path:
        """The task as `datasets` saves it."""
        return self.root / "dataset"

    @property
    def suite(self) -> Path:
        return self.root / "suite.yaml"


def make_command_world(root: Path, run: Path) -> CommandWorld:
    """Make it all but the run in ``root``."""
    world = CommandWorld(root, run)
    tiny_model(root, "base")
    for name, words, seed in (("acl", DOMAIN, 0), ("wiki", GENERAL, 1)):
        text = write_text(root / f"{name}.jsonl", words, 60, seed)
        dga_scale.corpus.cli.main([
            str(text), "--tokenizer", str(world.base), "--sequence_length", "32", "--validation_share", "0.4",
            "--num_workers", "1", "--output", str(root / name),
        ])  # fmt: skip
    model = AutoModelForMaskedLM.from_pretrained(world.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(world.adapted)
    load_tokenizer(world.base).save_pretrained(world.adapted)
    write_task(world.task, train=16, test=8)
    splits = {name: load_dataset("json", data_files=str(world.task / f"{name}.jsonl"), split="train",
                                 cache_dir=str(root / "cache")) for name in ("train", "test")}  # fmt: skip
    DatasetDict(splits).save_to_disk(world.dataset)
    content = {
        "domain_corpora": [str(root / "acl")],
        "general_corpora": [str(root / "wiki")],
        "domain_tasks": [str(world.task)],
        "seeds": 1,
        "recipe": {"epochs": 1, "learning_rate": 3e-3, "metric": "accuracy", "precision": "fp32"},
    }
    world.suite.write_text(yaml.safe_dump(content))
    return world


NAMES = (
    "shard-1", "consolidate", "report", "finetune", "forgetting", "evaluate", "merge", "merge-sweep",
    "consistency",
)  # fmt: skip


RECIPE = ("--epochs", "1", "--learning_rate", "3e-3", "--metric", "accuracy")


def commands(world: CommandWorld) -> list[Command]:
    """List the commands that one process runs."""
    base, adapted = str(world.base), str(world.adapted)
    corpora = ("--corpus", str(world.root / "acl"), "--general_corpus", str(world.root / "wiki"))
    return [
        sharding(world, workers=1),
        Command("consolidate", "dga_scale.train.cli:consolidate_command",
                (str(world.run), "--output", "model")),
        Command("report", "dga_scale.report.cli:report_command",
                (str(world.run), "--output", "report.html", "--figures", "figures"), pictures=False),
        Command("finetune", "dga_scale.endtasks.cli:finetune",
                ("--model", base, "--task", str(world.task), "--output_dir", "scores", "--seeds", "2",
                 *RECIPE),
                finished=("scores/seed-*.json",)),
        Command("forgetting", "dga_scale.endtasks.cli:forgetting",
                ("run", "--task", f"intent={world.task}", f"other={world.task}", "--seeds", "1", *RECIPE),
                (("run/1-intent/model", world.base), ("run/2-other/model", world.adapted)),
                ("run/forgetting/**/seed-*.json",)),
        Command("evaluate", "dga_scale.endtasks.evaluate_cli:main",
                ("--base", base, "--model", adapted, "--suite", str(world.suite), "--output_dir", "scores"),
                finished=("scores/**/seed-*.json", "scores/**/held_out.json")),
        Command("merge", "dga_scale.merging.cli:main",
                ("--base", base, "--model", adapted, "--output", "merged")),
        Command("merge-sweep", "dga_scale.merging.cli:main",
                ("--base", base, "--model", adapted, "--sweep", "0.25,1", "--output", "merged", *corpora)),
        Command("consistency", "dga_scale.report.consistency:main",
                ("--model", base, "--corpus", *corpora[1::2], "--rows", "8")),
    ]  # fmt: skip


def more_commands(world: CommandWorld) -> list[Command]:
    """List those that start processes of their own, or take long for a test."""
    arguments = ("--model", str(world.base), "--output_dir", "scores", "--seeds", "2", *RECIPE)
    return [
        sharding(world, workers=4),
        Command("finetune-jobs", "dga_scale.endtasks.cli:finetune",
                (*arguments, "--task", str(world.task), "--jobs", "2"), finished=("scores/seed-*.json",)),
        Command("finetune-dataset", "dga_scale.endtasks.cli:finetune",
                (*arguments, "--task", str(world.dataset)), finished=("scores/seed-*.json",)),
        Command("demo-prepare", "tests.helpers.kill_commands:prepare_demo"),
    ]  # fmt: skip


def prepare_demo() -> int:
    """Make the demo's folder of a little text, without the training of its base."""
    documents = [Document(f"{n}.py", " ".join(DOMAIN[n % 9 :] * 9) + f" {n}") for n in range(99)]

    def run(name: str, *words: object, **_: object) -> None:
        if name == "dga-shard":
            dga_scale.corpus.cli.main([str(word) for word in words])
        else:
            Path("demo", "base").mkdir()
            Path("demo", "base", "report.html").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "run_command", run)
        patch.setattr(prepare, "docstrings", lambda: documents)
        patch.setattr(prepare, "wikipedia", lambda: documents)
        prepare.prepare(Path("demo"))
    return 0


def sharding(world: CommandWorld, workers: int) -> Command:
    """Sharding into several shards; from four workers on by worker processes."""
    text = [str(world.root / f"{name}.jsonl") for name in ("acl", "wiki")]
    arguments = (
        *text, "--tokenizer", str(world.base), "--sequence_length", "32", "--validation_share", "0.4",
        "--num_workers", str(workers), "--shard_size", "0.01", "--output", "corpus",
    )  # fmt: skip
    return Command(f"shard-{workers}", "dga_scale.corpus.cli:main", arguments)
