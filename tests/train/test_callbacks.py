"""Callbacks in real runs on two ranks: when and in which order they are called, there and on resume."""

from pathlib import Path
from typing import Any

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.launch.world import join_cluster
from dga_scale.logging.json_lines import read_log
from dga_scale.train.callbacks import Callback, RunState
from dga_scale.train.loop import train
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.helpers.stops import ask_to_stop
from tests.test_train import STEPS, arguments

Seen = list[tuple[str, int, list[str]]]
"""Which method was called after how many steps, and what was logged of that step by then."""


class Recorder(Callback):
    """Remembers its calls, and what the run's own callbacks had logged before each.

    Args:
        stop_at: a signal comes to this rank after that step.

    """

    def __init__(self, stop_at: int = 0) -> None:
        self.seen: Seen = []
        self._stop_at = stop_at

    def on_start(self, run: RunState) -> None:
        self._remember("on_start", run)
        assert run.batches is None

    def after_step(self, run: RunState) -> None:
        self._remember("after_step", run)
        assert run.batches is not None
        assert run.batches.step + 1 == run.step
        if run.step == self._stop_at:
            ask_to_stop()

    def on_end(self, run: RunState) -> None:
        self._remember("on_end", run)
        assert run.last

    def _remember(self, name: str, run: RunState) -> None:
        # Rank 0 writes the log, and sees what it has written.
        records = read_log(run.inputs.folder.path / "log.jsonl") if run.cluster.rank == 0 else []
        logged = [record.get("event", "step") for record in records if record["step"] == run.step]
        self.seen.append((name, run.step, logged))


def recorded(flags: list[str], stop_at: int) -> tuple[int, Seen]:
    cluster = join_cluster()
    recorder = Recorder(stop_at if cluster.rank == 1 else 0)
    with no_pictures():
        return train(read_config(flags), cluster, [recorder]), recorder.seen


def names(seen: Seen) -> list[tuple[str, int]]:
    return [(name, step) for name, step, _ in seen]


def test_callbacks_are_called_in_order_on_all_ranks_and_not_again_where_a_run_resumes(
    world: SmallWorld, tmp_path: Path
) -> None:
    """Saves are due every 2 steps, evaluations every 3, records of protection every 2."""
    flags = arguments(world, tmp_path / "run", soft_mask="update", max_eval_samples=16)
    (code, first), (_, other) = run_ranks(2, recorded, flags, 2)
    assert code == EXIT_STOPPED
    assert names(first) == names(other)
    done = first[-1][1]
    assert names(first) == [("on_start", 0), *(("after_step", step) for step in range(1, done + 1))]
    (code, second), (_, other) = run_ranks(2, recorded, flags, 0)
    assert code == 0
    assert names(second) == names(other)
    rest = [("after_step", step) for step in range(done + 1, STEPS + 1)]
    assert names(second) == [("on_start", done), *rest, ("on_end", STEPS)]

    logged: dict[Any, list[str]] = {(name, step): events for name, step, events in first + second}
    assert logged["on_start", 0] == ["evaluation", "importance"]
    assert logged["after_step", 1] == ["step"]
    assert logged["after_step", 2] == ["step", "protection"], "a checkpoint comes last"
    assert logged["after_step", STEPS] == ["step", "evaluation", "protection"]
    assert logged["on_end", STEPS] == ["step", "evaluation", "protection", "checkpoint"]


class Failing(Callback):
    def on_start(self, run: RunState) -> None:
        raise RuntimeError(f"callback of rank {run.cluster.rank}")


def failing(flags: list[str]) -> int:
    return train(read_config(flags), join_cluster(), [Failing()])


def test_an_error_of_a_callback_ends_the_run(world: SmallWorld, tmp_path: Path) -> None:
    flags = arguments(world, tmp_path / "run", method="mlm", max_eval_samples=16)
    with pytest.raises(Exception, match="callback of rank 0"):
        run_ranks(1, failing, flags)
    assert not [r for r in read_log(tmp_path / "run" / "log.jsonl") if "loss/total" in r]
