"""Whole runs on two ranks that are killed at random moments and launched again until they end.

``tests/test_kills.py`` and ``benchmarks/kill_soak.py`` draw faults from here. A fault kills one rank or all:

- after a random time ("time"),
- just before a random call that changes the run's folder ("call"): a file opened for writing or a folder for
  syncing, a rename, a removal, a new folder: all the moments of a commit are among them,
- in the middle of writing a file, once it has a random length ("bytes"): the kernel ends the process (SIGXFSZ
  under RLIMIT_FSIZE), as it would by SIGKILL,
- just before a random batch of what is measured before the first step ("batch"): importance, the Fisher, the
  warm-up of the head,
- or it stops a rank for good ("stop").
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import BertForMaskedLM

from dga_scale.checkpoint.companions import companion_names
from dga_scale.checkpoint.store import newest_complete
from dga_scale.launch.preemption import StopConsensus
from dga_scale.launch.watchdog import EXIT_RANK_LOST, Watchdog
from dga_scale.run_folder import RunFolder
from dga_scale.storage.checked_json import CHECKSUM
from dga_scale.storage.safetensors_stream import record_of
from tests.helpers.forks import Launch, launch
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld

RANKS = 2
DEATHS = (-signal.SIGKILL, -signal.SIGXFSZ)
HEARTBEAT_TIMEOUT = 30.0
COUNTS = re.compile(r"calls: (\d+), batches: (\d+)")
SURVIVOR_SECONDS = 60.0
"""A survivor gets to end in. It takes a fraction of one; a machine may be busy."""


@dataclass(frozen=True)
class Fault:
    """What happens to a launch. ``victim``: a rank, or None for all. ``at``: seconds, number of the call, or
    bytes of a file."""

    how: str
    victim: int | None
    at: float


@dataclass
class Outcome:
    """What came of a fault."""

    fault: Fault
    struck: bool
    """False: the run ended before."""
    met: bool = True
    """False: it struck before the ranks watched each other; a launcher ends the others then."""
    seconds_to_end: float = 0.0
    """From the victim's death to the survivor's."""
    steps_again: int = 0
    """Steps of this launch that are not in the newest checkpoint."""


@dataclass
class Soak:
    """Runs in ``folder``, all of the same settings; ``reference`` is what an uninterrupted one logged."""

    world: SmallWorld
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    reference: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    """An uninterrupted run takes."""
    calls: list[int] = field(default_factory=list)
    """By rank, calls of an uninterrupted run that change the folder."""
    batches: int = 0
    """Batches of what an uninterrupted run measures before its first step, on each rank."""
    made: dict[str, str] = field(default_factory=dict)
    """By path, hashes of what it measured and made."""
    events: list[tuple[str, int]] = field(default_factory=list)
    """What it logged beside the steps: name and step of each."""
    largest: int = 0
    """Bytes of the largest file that a run writes."""

    def flags(self, run: Path) -> list[str]:
        """Flags of a run; fp32, so that resumed runs can be compared bit for bit."""
        values = {
            "ds_config": REPOSITORY / "ds_configs" / "zero2.json",
            "model": self.world.model,
            "corpus": self.world.corpus,
            "output_dir": run,
            "max_steps": 8,
            "global_batch_size": 8,
            "learning_rate": 1e-3,
            "soft_mask": "update",
            "importance_samples": 16,
            "max_eval_samples": 16,
            "save_steps": 2,
            "eval_steps": 4,
            "protection_steps": 4,
            "save_total_limit": 2,
            "bf16": "false",
            "heartbeat_timeout": HEARTBEAT_TIMEOUT,
            **self.settings,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def measure(self) -> None:
        """Run once without a fault."""
        run = self.folder / "reference"
        launched = launch(RANKS, program, self.flags(run), run, None)
        assert launched.wait(300) == [0] * RANKS, launched.output(0)
        self.seconds = max(launched.seconds.values())
        counts = [re.search(COUNTS, launched.output(rank)) for rank in range(RANKS)]
        self.calls = [int(found[1]) for found in counts if found]
        self.batches = max(int(found[2]) for found in counts if found)
        self.reference, self.made, self.events = logged(run), made(run), events(run)
        self.largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
        assert sorted(self.reference) == list(range(1, max(self.reference) + 1))
        assert_no_leftovers(run)

    def draw_batch(self, draws: random.Random) -> Fault:
        """A fault at random before a batch of what is measured."""
        return Fault("batch", draws.choice([0, 1, None]), draws.randint(1, self.batches))

    def draw(self, draws: random.Random, stops: bool = False) -> Fault:
        """A fault at random."""
        victim = draws.choice([0, 1, None])
        how = draws.choice(["time", "call", "call", "bytes"])
        if stops and draws.random() < 0.02:
            how, victim = "stop", draws.choice([0, 1])
        match how:
            case "call":
                return Fault(how, victim, draws.randint(1, self.calls[victim or 0]))
            case "bytes":
                # Small files die of small numbers.
                return Fault(how, victim, int(math.exp(draws.uniform(4.0, math.log(self.largest)))))
        return Fault(how, victim, draws.uniform(0.0, self.seconds))

    def run(self, name: str, faults: Iterator[Fault]) -> Iterator[Outcome]:
        """One run, launched again after each fault until it ends; checked on the way and at its end.

        Raises:
            AssertionError: a loss, the final model or what is left in the folder is not as without faults.
        """
        run = self.folder / name
        for fault in faults:
            finished = _finished(run)
            launched = launch(RANKS, program, self.flags(run), run, fault)
            outcome = strike(launched, fault, run)
            after = _finished(run)
            assert {name: after.get(name) for name in finished} == finished, f"{fault}: measured again"
            again = logged(run)
            assert again == {step: self.reference[step] for step in again}, f"{name} {fault}: other losses"
            if not outcome.struck:
                break
            checkpoint = newest_complete(run)
            saved = checkpoint.step if checkpoint else 0
            done = re.findall(r"^step (\d+)/", launched.output(0), re.MULTILINE)
            outcome.steps_again = sum(int(step) > saved for step in done)
            yield outcome
        assert logged(run) == self.reference, name
        assert made(run) == self.made, f"{name}: {made(run)}, not {self.made}"
        assert events(run) == self.events, f"{name}: {events(run)}, not {self.events}"
        assert_no_leftovers(run)


def measuring(method: str, world: SmallWorld, folder: Path) -> dict[str, Any]:
    """Settings of two steps after, and before, a measurement: head and Fisher (ewc), importance (das)."""
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "max_eval_samples": 8}
    if method == "das":
        return {**settings, "method": "das"}
    headless = folder / "headless"
    shutil.copytree(world.model, headless)
    BertForMaskedLM.from_pretrained(world.model).bert.save_pretrained(headless)
    unknown = {"soft_mask": None, "importance_samples": None, "protection_steps": None}
    head = {"model": headless, "head_warmup_steps": 4}
    fisher = {"method": "ewc", "general_corpus": world.general_corpus, "fisher_samples": 8}
    return {**settings, **unknown, **head, **fisher}


def strike(launched: Launch, fault: Fault, run: Path) -> Outcome:
    """Wait for a launch and its fault to end; a rank that survives has to end itself, naming the victim."""
    victims = range(RANKS) if fault.victim is None else [fault.victim]
    if fault.how in ("time", "stop"):
        left = launched.started + fault.at - time.monotonic()
        while left > 0 and not launched.ended(left):
            left = launched.started + fault.at - time.monotonic()
        for rank in victims:
            launched.kill(rank, signal.SIGKILL if fault.how == "time" else signal.SIGSTOP)
    deadline = time.monotonic() + 300
    while not launched.codes and (fault.how != "stop" or _met(launched, run)):
        launched.ended(10)
        assert time.monotonic() < deadline, "a launch hangs"
    met = _met(launched, run)
    if fault.how == "stop" or not met:  # a launcher ends the others then
        for rank in victims if met else range(RANKS):
            launched.kill(rank)
    codes = launched.wait(SURVIVOR_SECONDS)
    for pid in launched.pids:
        _mark(run, pid).unlink(missing_ok=True)
    if all(code == 0 for code in codes):
        return Outcome(fault, struck=False)
    dead = [rank for rank, code in enumerate(codes) if code in DEATHS]
    said = "\n".join(launched.output(rank) for rank in range(RANKS))
    assert dead, f"{fault}: exit codes {codes}\n{said}"
    first = fault.at if fault.how == "stop" else min(launched.seconds[rank] for rank in dead)
    for rank in range(RANKS):
        if met and rank not in dead and codes[rank] != 0:
            assert codes[rank] == EXIT_RANK_LOST, f"{fault}: exit codes {codes}\n{said}"
            assert f"error: rank {dead[0]} on " in said, said
            assert "Traceback" not in said, said
    last = max(seconds for rank, seconds in launched.seconds.items() if rank not in dead or len(dead) > 1)
    return Outcome(fault, struck=True, met=met, seconds_to_end=last - first)


def _met(launched: Launch, run: Path) -> bool:
    """Whether the ranks watch each other."""
    return all(_mark(run, pid).exists() for pid in launched.pids)


def logged(run: Path) -> dict[int, float]:
    """Losses by step; a torn last line is none."""
    with suppress(FileNotFoundError):
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {r["step"]: r["loss/total"] for r in records if "loss/total" in r}
    return {}


def events(run: Path) -> list[tuple[str, int]]:
    """What a run logged beside its steps; a checkpoint may be there before it is logged."""
    lines = (run / "log.jsonl").read_text().splitlines()
    found = [(r["event"], r["step"]) for r in map(json.loads, lines) if "event" in r]
    return [each for each in found if each[0] != "checkpoint"]


def _finished(run: Path) -> dict[str, tuple[int, int]]:
    """The files that a run measures once, each with its identity."""
    paths = [run / name for name in companion_names(RunFolder(run))]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.exists()}


def made(run: Path) -> dict[str, str]:
    """Hashes of the tensors that a run measured and made, by path; its checkpoints hold steps of theirs."""
    paths = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    return {str(path.relative_to(run)): _hash(path) for path in paths}


def _hash(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        # The library writes several entries of metadata in any order.
        return (file.metadata() or {}).get(CHECKSUM) or record_of(path).sha256


def assert_no_leftovers(run: Path) -> None:
    """Nothing temporary is in a run's folder, and two checkpoints are."""
    names = [str(path.relative_to(run)) for path in run.rglob("*")]
    assert not [name for name in names if name.endswith((".tmp", ".old", ".partial"))], names
    assert len(list((run / "checkpoints").glob("step-*"))) == 2, names


# --- in the ranks ----------------------------------------------------------------------------------------


def program(flags: list[str], run: Path, fault: Fault | None) -> None:
    """``dga_train.py`` with these flags, under a fault."""
    from dga_scale.train import cli

    cli.end_rank = sys.exit  # a forked rank looks for lost errors first, and then ends as fast
    _tell_when_watching(run)
    counts = arm(run, fault)
    sys.argv = ["dga_train.py", *flags]
    try:
        with no_pictures():
            cli.train_command()
    finally:
        print(counts, flush=True)


def _tell_when_watching(run: Path) -> None:
    enter = Watchdog.__enter__

    def entered(self: Watchdog) -> Watchdog:
        enter(self)
        _mark(run, os.getpid()).touch()
        return self

    Watchdog.__enter__ = entered  # type: ignore[method-assign]


def _mark(run: Path, pid: int) -> Path:
    """Lies beside the run's folder where a rank is watching."""
    return run.parent / f"watching-{pid}"


@dataclass
class Counts:
    """Counts of this process: calls that change the folder, and questions whether to stop (batches)."""

    calls: int = 0
    batches: int = 0
    fatal: Fault | None = None

    def __str__(self) -> str:
        return f"calls: {self.calls}, batches: {self.batches}"

    def call(self) -> None:
        self.calls += 1
        self._end("call", self.calls)

    def batch(self) -> None:
        self.batches += 1
        self._end("batch", self.batches)

    def _end(self, how: str, count: int) -> None:
        fault = self.fatal
        if fault and (fault.how, int(fault.at)) == (how, count):
            if fault.victim is None:
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def arm(folder: Path, fault: Fault | None) -> Counts:
    """Let this process die of a fault in ``folder``, if it is the victim; count its calls and batches."""
    rank, counts = int(os.environ["RANK"]), Counts()
    if fault is not None and fault.victim in (None, rank):
        if fault.how == "bytes":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
        elif fault.victim == rank or rank == 0:  # of several victims one counts, and takes the others along
            counts.fatal = fault
    _count_calls(str(folder), counts.call)
    _count_batches(counts.batch)
    return counts


def _count_calls(inside: str, count: Callable[[], None]) -> None:
    """Count the calls that change a folder, each just before it is made."""

    def changes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
                return False
            return bool(flags & (os.O_WRONLY | os.O_RDWR)) or os.path.isdir(path)
        if event in ("os.rename", "os.mkdir", "os.symlink"):
            path = arguments[event == "os.symlink"]
            return os.path.abspath(os.fsdecode(path)).startswith(inside)
        # A folder's content is removed by names relative to it.
        return event in ("os.remove", "os.rmdir") and (
            arguments[-1] >= 0 or os.path.abspath(os.fsdecode(arguments[0])).startswith(inside)
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes(event, arguments):
            count()

    sys.addaudithook(hook)


def _count_batches(count: Callable[[], None]) -> None:
    """Count where a rank asks whether it should stop: before each batch of a measurement, among others."""
    now = StopConsensus.now

    def counted(self: StopConsensus, requested: bool) -> bool:
        count()
        return now(self, requested)

    StopConsensus.now = counted  # type: ignore[method-assign]
