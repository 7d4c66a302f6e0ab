"""A stop signal to one rank in any phase of a run: all leave together, with what is done saved."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dga_scale.preservation.protection
import dga_scale.train.loop
from dga_scale.checkpoint.state import Save
from dga_scale.checkpoint.store import newest_complete
from dga_scale.evaluation.held_out import Evaluator
from dga_scale.launch.preemption import EXIT_STOPPED, ONE_REQUEST, StopRequest
from dga_scale.launch.watchdog import EXIT_RANK_LOST, Watchdog
from dga_scale.launch.world import join_cluster
from dga_scale.train.trainer import Trainer
from tests.helpers.forks import launch
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld, make_world
from tests.helpers.stops import ask_to_stop
from tests.test_train import STEPS, arguments, losses, run_training

PHASES: dict[str, tuple[Any, str, int]] = {
    # what is called when the signal comes, and at which of its calls
    "importance": (dga_scale.preservation.protection, "measure_importance", 1),
    "training": (Trainer, "step", 3),
    "saving": (Save, "write", 1),
    "evaluation": (Evaluator, "evaluate", 2),
    "finish": (dga_scale.train.loop, "finish", 1),
}
CASES = [
    # phase, signal, rank, steps done in the end (one step carries the request, the next one heeds it)
    ("start", signal.SIGTERM, 0, 0),
    ("importance", signal.SIGINT, 1, 0),
    ("training", signal.SIGTERM, 1, 4),
    ("saving", signal.SIGINT, 0, 4),
    ("evaluation", signal.SIGUSR1, 0, 5),
    ("finish", signal.SIGUSR1, 1, STEPS),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def flags(world: SmallWorld, run: Path) -> list[str]:
    return arguments(world, run, soft_mask="update", importance_samples=16, max_eval_samples=16)


@pytest.fixture(scope="module")
def expected(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that nobody stops."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert run_ranks(2, run_training, flags(world, run)) == [0, 0]
    return losses(run)


def run_signalled(run_flags: list[str], phase: str, number: int, rank: int) -> int:
    """One rank gets the signal in ``phase``."""
    cluster = join_cluster()

    def send() -> None:
        if cluster.rank == rank:
            ask_to_stop(number)

    with StopRequest():
        if phase == "start":
            send()
            return run_training(run_flags)
        owner, name, which = PHASES[phase]
        original, calls = getattr(owner, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == which:
                send()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)
        try:
            return run_training(run_flags)
        finally:
            setattr(owner, name, original)


@pytest.mark.parametrize(("phase", "number", "rank", "steps"), CASES, ids=[case[0] for case in CASES])
def test_a_signal_in_any_phase(
    world: SmallWorld, expected: list[float], tmp_path: Path, phase: str, number: int, rank: int, steps: int
) -> None:
    run = tmp_path / "run"
    codes = run_ranks(2, run_signalled, flags(world, run), phase, int(number), rank)
    # A run that is finishing has done all its steps: it ends as if nobody had asked.
    assert codes == [0 if phase == "finish" else EXIT_STOPPED] * 2
    if phase == "start":
        assert not run.exists()
        return
    found, checkpoint = losses(run), newest_complete(run)
    assert found == expected[:steps]
    assert (checkpoint.step if checkpoint else 0) == steps
    if phase in ("saving", "evaluation"):
        assert run_ranks(2, run_training, flags(world, run)) == [0, 0]
        assert losses(run) == expected


# --- ranks that wait for others --------------------------------------------------------------------------


def waits_in_a_collective() -> int:
    """Rank 1 never comes."""
    with StopRequest(joined=False) as stop, join_cluster() as cluster, Watchdog(cluster, 60.0):
        stop.joined = True
        print("ready", flush=True)
        if cluster.rank == 1:
            time.sleep(600)
        torch.distributed.all_reduce(torch.zeros(1))
    return 0


def waits_for_the_other_to_join() -> int:
    """Rank 1 never joins."""
    with StopRequest(joined=False):
        print("ready", flush=True)
        if os.environ["RANK"] == "1":
            time.sleep(600)
        join_cluster()
    return 0


def started(fn: Callable[[], int]) -> Any:
    launched = launch(2, fn)
    while not all("ready" in launched.output(rank) for rank in (0, 1)):
        assert not launched.ended(0.1), launched.output(0)
    time.sleep(0.5)
    return launched


def test_a_second_signal_works_in_a_collective() -> None:
    launched = started(waits_in_a_collective)
    launched.kill(0, signal.SIGTERM)
    assert not launched.ended(ONE_REQUEST + 0.5), "one request waits for the other ranks"
    launched.kill(0, signal.SIGTERM)
    while 0 not in launched.codes and not launched.ended(ONE_REQUEST + 0.5):
        launched.kill(0, signal.SIGTERM)  # on a busy machine it took both for one
    assert launched.wait() == [128 + signal.SIGTERM, EXIT_RANK_LOST]
    assert "error: rank 0 on 127.0.0.1 is gone" in launched.output(1)


def test_a_signal_before_the_ranks_have_met_leaves_at_once() -> None:
    launched = started(waits_for_the_other_to_join)
    launched.kill(0, signal.SIGUSR1)
    launched.ended(60)
    launched.kill(1, signal.SIGKILL)
    assert launched.wait() == [EXIT_STOPPED, -signal.SIGKILL]
