"""A disk that is full, or a folder read-only, while a run saves: really so, on a small file system."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dga_scale.checkpoint.store import newest_verified
from dga_scale.launch.world import single_process
from dga_scale.train.trainer import Trainer
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import SmallWorld, make_world
from tests.test_train import STEPS, arguments, around_steps, losses, run_training

MEBIBYTES = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run on a sound disk."""
    run = tmp_path_factory.mktemp("runs") / "sound"
    assert run_ranks(2, run_training, flags(world, run)) == [0, 0]
    return losses(run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    pytest.skip("needs the right to mount a file system")


def flags(world: SmallWorld, run: Path) -> list[str]:
    return arguments(
        world, run, soft_mask="update", importance_samples=16, max_eval_samples=16, eval_steps=STEPS
    )


def make_read_only(folder: Path, read_only: bool) -> None:
    if read_only:
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    else:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, full: bool) -> None:
    """Leave no byte, or give all back."""
    filler = disk / "filler"
    if not full:
        filler.unlink()
        return
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def trouble(disk: Path, kind: str, on: bool) -> None:
    if kind == "full":
        fill(disk, on)
    else:
        make_read_only(disk / "run" / "checkpoints", on)


def run_in_trouble(run_flags: list[str], disk: Path, kind: str, until: int) -> int:
    """The disk fails from the step after the first save on, before step number ``until``."""

    @contextlib.contextmanager
    def troubled(trainer: Trainer, batches: Any) -> Iterator[None]:
        if trainer.cluster.rank == 0 and batches.step in (2, until):
            trouble(disk, kind, on=batches.step == 2)
        trainer.cluster.barrier()
        yield

    with around_steps(troubled):
        return run_training(run_flags)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_training_continues_after_a_save_that_failed(
    world: SmallWorld, expected: list[float], disk: Path, kind: str
) -> None:
    """Steps 3 to 5 with a disk or folder that takes nothing, among them the save after step 4."""
    run = disk / "run"
    assert run_ranks(2, run_in_trouble, flags(world, run), disk, kind, 5) == [0, 0]
    assert losses(run) == expected
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (failed,) = [record for record in records if record.get("event") == "save_failed"]
    assert failed["step"] == 4
    assert f"checkpoint {run / 'checkpoints' / 'step-000004'} could not be written" in failed["error"]
    assert ("No space left" if kind == "full" else "Read-only") in failed["error"]
    assert str(run / "checkpoints" / "step-000002") in failed["error"]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-000002", "step-000006"]


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_run_that_can_not_save_at_its_end_says_so_and_resumes_later(
    world: SmallWorld, expected: list[float], disk: Path, kind: str
) -> None:
    run = disk / "run"
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_in_trouble, flags(world, run), disk, kind, STEPS)
    for name, text in caught.value.errors.values():
        assert name == "UserError"
        assert f"checkpoint {run / 'checkpoints' / 'step-000006'} could not be written" in text
        assert f"The last complete one is {run / 'checkpoints' / 'step-000002'}" in text
    older = newest_verified(run, single_process())
    assert older is not None
    assert older.step == 2
    trouble(disk, kind, on=False)
    assert run_ranks(2, run_training, flags(world, run)) == [0, 0]
    assert losses(run) == expected


def test_a_first_save_that_fails_ends_the_run(world: SmallWorld, disk: Path) -> None:
    """There is nothing to fall back on: what is wrong is rather the folder than the moment."""
    run = disk / "run"
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_in_trouble_from_the_start, flags(world, run), disk)
    assert {name for name, _ in caught.value.errors.values()} == {"UserError"}
    assert all("There is no complete one yet" in text for _, text in caught.value.errors.values())


def run_in_trouble_from_the_start(run_flags: list[str], disk: Path) -> int:
    @contextlib.contextmanager
    def troubled(trainer: Trainer, batches: Any) -> Iterator[None]:
        if trainer.cluster.rank == 0 and batches.step == 0:
            fill(disk, full=True)
        trainer.cluster.barrier()
        yield

    with around_steps(troubled):
        return run_training(run_flags)
