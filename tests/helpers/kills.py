"""Whole runs on two ranks that are killed at random moments and launched again until they end.

``tests/test_kills.py`` and ``benchmarks/kill_soak.py`` draw faults from here. A fault kills one rank or all:

- after a random time ("time"),
- just before a random call that changes the run's folder ("call"): a file opened for writing or a folder for
  syncing, a rename, a removal, a new folder: all the moments of a commit are among them,
- in the middle of writing a file, once it has a random length ("bytes"): the kernel ends the process (SIGXFSZ
  under RLIMIT_FSIZE), as it would by SIGKILL,
- or it stops a rank for good ("stop").
"""

import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dga_scale.checkpoint.store import newest_complete
from dga_scale.launch.watchdog import EXIT_RANK_LOST, Watchdog
from dga_scale.storage.safetensors_stream import record_of
from tests.helpers.forks import Launch, launch
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld

RANKS = 2
DEATHS = (-signal.SIGKILL, -signal.SIGXFSZ)
HEARTBEAT_TIMEOUT = 30.0
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
    model: str = ""
    seconds: float = 0.0
    """An uninterrupted run takes."""
    calls: list[int] = field(default_factory=list)
    """By rank, calls of an uninterrupted run that change the folder."""
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
        return [f"--{name}={value}" for name, value in values.items()]

    def measure(self) -> None:
        """Run once without a fault."""
        run = self.folder / "reference"
        launched = launch(RANKS, program, self.flags(run), run, None)
        assert launched.wait(300) == [0] * RANKS, launched.output(0)
        self.seconds = max(launched.seconds.values())
        self.calls = [int(launched.output(rank).rpartition("calls: ")[2]) for rank in range(RANKS)]
        self.reference = logged(run)
        self.model = record_of(run / "model" / "model.safetensors").sha256
        self.largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
        assert sorted(self.reference) == list(range(1, max(self.reference) + 1))
        assert_no_leftovers(run)

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
            launched = launch(RANKS, program, self.flags(run), run, fault)
            outcome = strike(launched, fault, run)
            again = logged(run)
            assert again == {step: self.reference[step] for step in again}, f"{name} {fault}: other losses"
            if not outcome.struck:
                break
            checkpoint = newest_complete(run)
            saved = checkpoint.step if checkpoint else 0
            done = re.findall(r"^step (\d+)/", launched.output(0), re.MULTILINE)
            outcome.steps_again = sum(int(step) > saved for step in done)
            yield outcome
        assert logged(run) == self.reference
        assert record_of(run / "model" / "model.safetensors").sha256 == self.model
        assert_no_leftovers(run)


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
    calls = [0]
    strikes = fault is not None and fault.victim in (None, int(os.environ["RANK"]))
    if fault is None or fault.how == "call":
        # Of several victims one counts, and takes the others along.
        counts = strikes and (fault.victim is not None or os.environ["RANK"] == "0")
        _count_calls(run, calls, int(fault.at) if fault and counts else 0, fault and fault.victim is None)
    elif fault.how == "bytes" and strikes:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
    sys.argv = ["dga_train.py", *flags]
    try:
        with no_pictures():
            cli.train_command()
    finally:
        print("calls:", calls[0], flush=True)


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


def _count_calls(run: Path, calls: list[int], fatal: int, all_ranks: bool | None) -> None:
    """Count the calls that change the run's folder; die just before the ``fatal``-th (0: never)."""
    inside = str(run)

    def changes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            if not str(path).startswith(inside):
                return False
            return bool(flags & (os.O_WRONLY | os.O_RDWR)) or os.path.isdir(path)
        if event in ("os.rename", "os.mkdir"):
            return str(arguments[0]).startswith(inside)
        # A folder's content is removed by names relative to it.
        return event in ("os.remove", "os.rmdir") and (
            arguments[-1] >= 0 or str(arguments[0]).startswith(inside)
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes(event, arguments):
            calls[0] += 1
            if calls[0] == fatal:
                if all_ranks:
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
