"""Saves in the background: the same bytes, committed or absent at any kill, failures known to all ranks."""

import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from dga_scale.checkpoint.async_save import Saves
from dga_scale.checkpoint.store import find_resume_point
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED, StopConsensus
from dga_scale.launch.world import join_cluster, single_process
from dga_scale.logging.json_lines import read_log
from tests.checkpoint.test_state import kill_at_each_point, same, state_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.helpers.training import Setup, describe_save, save, tiny_bert, tiny_engine, train_step
from tests.test_train import arguments, losses, run_training, run_until


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def both_ways(setup: Setup, folder: Path) -> tuple[list[int], int, int]:
    """Save twice, waiting and in the background; the second writes only after a further step was made.

    Returns:
        saves written while the first and the second were under way, bytes of the copies, the model's entries.
    """
    engine, saves, written = tiny_engine(setup), Saves(background=True), []
    for step in (1, 2):
        train_step(engine, step)
        save(engine, folder / "waiting", step)
        may_write, late = threading.Event(), describe_save(engine, folder / "background", step)
        write = late.write
        late.write = lambda may_write=may_write, write=write: (may_write.wait(), write())  # type: ignore
        saves.begin(late, time.perf_counter())
        before = state_of(engine)
        train_step(engine, step + 10)
        assert not same(before, state_of(engine))
        written.append(saves.written)
        may_write.set()
        saved = saves.finish()
        assert saved is not None
        assert saved.step == step
        assert saves.written == saves.begun == step
    assert saves.finish() is None
    engine.destroy()
    copied = sum(copy.nbytes for copy in saves._copies.values())
    return written, copied, sum(p.numel() for p in tiny_bert().parameters())


@pytest.mark.parametrize(
    "setup", [Setup(0, "bf16"), Setup(2), Setup(3, "bf16", persistence=1000)], ids=lambda setup: str(setup)
)
def test_the_bytes_are_those_of_a_save_that_training_waits_for(setup: Setup, tmp_path: Path) -> None:
    answers = run_ranks(2, both_ways, setup, tmp_path)
    assert [written for written, *_ in answers] == [[0, 1], [0, 1]]
    assert sum(copied for _, copied, _ in answers) == 12 * answers[0][2], "weights and moments, once"
    waiting, background = contents(tmp_path / "waiting"), contents(tmp_path / "background")
    assert {"checkpoints/step-000002/manifest.json", "checkpoints/latest"} <= waiting.keys()
    assert waiting == background


def agreed(lag: int) -> list[bool]:
    """When both ranks know that two saves are written, the second of which takes rank 1 ``lag`` steps."""
    cluster = join_cluster()
    consensus, known = StopConsensus(cluster), []
    for step in range(lag + 3):
        written = 2 if cluster.rank == 0 or step >= lag else 1
        own = {"memory": cluster.rank + 0.25, "other": 7.0} if step != 1 else {}
        terms = consensus.average({"loss": torch.tensor(float(cluster.rank))}, False, written, own)
        assert {name: value.tolist() for name, value in terms.items()} == (
            {"loss": 0.5, "memory": [0.25, 1.25], "other": [7.0, 7.0]} if own else {"loss": 0.5}
        )
        known.append(consensus.written(2))
    return known


def test_all_ranks_know_in_the_same_step_that_all_have_written() -> None:
    for known in run_ranks(2, agreed, 2):
        assert known == [False, False, False, True, True]


def full_disk(folder: Path) -> tuple[str, list[str], bool]:
    """Rank 1 may not write files of more than 20 kB while the thread writes the second save."""
    engine, cluster, saves = tiny_engine(Setup(2)), join_cluster(), Saves(background=True)
    train_step(engine, 0)
    saves.begin(describe_save(engine, folder, 1), time.perf_counter())
    saves.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cluster.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        saves.begin(describe_save(engine, folder, 2), time.perf_counter())
        train_step(engine, 1)
        with pytest.raises(UserError) as caught:
            saves.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    cluster.barrier()
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    cluster.barrier()
    saves.begin(describe_save(engine, folder, 2), time.perf_counter())
    again = saves.finish()
    engine.destroy()
    return str(caught.value), left, again is not None and again.step == 2


def test_a_write_that_fails_is_every_ranks_error_and_the_next_save_is_made(tmp_path: Path) -> None:
    for error, left, again in run_ranks(2, full_disk, tmp_path):
        assert error.startswith("rank 1 on ")
        assert "step-000002 could not be written: File too large" in error
        assert left == ["latest", "step-000001"]
        assert again


def killed_in_the_background(folder: Path) -> list[tuple[int, bool]]:
    """Kill the process at each sync and rename of a save in its thread, and of the commit after it."""
    engine = tiny_engine(Setup(2))

    def save_again() -> None:
        saves = Saves(background=True)
        saves.begin(describe_save(engine, folder, 2), time.perf_counter())
        saves.finish()

    return kill_at_each_point(engine, folder, save_again)


def test_killed_at_any_point_it_is_committed_or_absent(tmp_path: Path) -> None:
    (found,) = run_ranks(1, killed_in_the_background, tmp_path)
    assert len(found) > 6
    assert found[0] == (1, True)
    assert found[-1] == (2, False)
    steps = [step for step, _ in found]
    assert steps == sorted(steps), "complete from one point on"


def test_a_run_that_saves_in_the_background_leaves_the_same(world: SmallWorld, tmp_path: Path) -> None:
    """Whole, and stopped by a signal after its third step, with two saves made by then."""
    settings = {"method": "mlm", "save_steps": 1, "save_total_limit": 0, "max_eval_samples": 16}
    assert run_ranks(2, run_training, arguments(world, tmp_path / "waiting", **settings)) == [0, 0]
    flags = arguments(world, tmp_path / "background", **settings, async_save="true")
    assert run_ranks(2, run_until, flags, 2, 1) == [EXIT_STOPPED, EXIT_STOPPED]
    last = find_resume_point(tmp_path / "background", "auto", single_process())
    assert last is not None
    assert last.step == len(losses(tmp_path / "background")), "a stop waits for its save"
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert contents(tmp_path / "background" / "checkpoints") == contents(tmp_path / "waiting" / "checkpoints")
    saved = [r for r in read_log(tmp_path / "background" / "log.jsonl") if r.get("event") == "checkpoint"]
    assert [r["step"] for r in saved] == [1, 2, 3, 4, 5, 6]
    assert all(0 < r["seconds"] <= r["written_seconds"] for r in saved)
