"""Checkpoints of a running engine: exact resume, other ranks and stages, saves that fail or are killed."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from dga_scale.checkpoint.state import load_checkpoint
from dga_scale.checkpoint.store import find_resume_point, newest_verified
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    FP16_HERE,
    MaskedLM,
    Setup,
    full_state,
    full_weights,
    save,
    tiny_bert,
    tiny_engine,
    train_step,
)

SAVED, LAST = 3, 6


def state_of(engine: Any) -> dict[str, dict[str, Tensor]]:
    return {"weights": full_weights(engine)} | {
        key: full_state(engine, key) for key in ("exp_avg", "exp_avg_sq")
    }


def same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    return all(
        one[kind].keys() == other[kind].keys()
        and all(torch.equal(t, other[kind][n]) for n, t in one[kind].items())
        for kind in one
    )


def train_and_save(setups: Sequence[Setup], folder: Path) -> list[dict[str, Any]]:
    """Run on after the save: what a resumed run is compared with. The second step is refused."""
    found = []
    for number, setup in enumerate(setups):
        engine = tiny_engine(setup)
        for step in range(SAVED):
            train_step(engine, step, "loss" if step == 1 else "")
        save(engine, folder / str(number), SAVED)
        saved = state_of(engine)
        losses = [train_step(engine, step) for step in range(SAVED, LAST)]
        found.append({"saved": saved, "losses": losses, "last": state_of(engine)})
        engine.destroy()
    return found


def resume(setups: Sequence[Setup], folder: Path) -> list[dict[str, Any]]:
    """Load into the engine of another model with the same shapes, and train on."""
    cluster, found = join_cluster(), []
    for number, setup in enumerate(setups):
        engine = tiny_engine(setup, MaskedLM(tiny_bert(seed=7)))
        train_step(engine, 0)  # moments and counts of its own, to be replaced
        checkpoint = find_resume_point(folder / str(number), "auto", cluster)
        assert checkpoint is not None
        state = load_checkpoint(engine, checkpoint, cluster)
        loaded = state_of(engine)
        losses = [train_step(engine, step) for step in range(state.step, LAST)]
        found.append({"loaded": loaded, "losses": losses, "last": state_of(engine), "state": state})
        assert (engine.global_steps, engine.skipped_steps) == (LAST, 1)
        engine.destroy()
    return found


EXACT = (
    Setup(0, "fp32"),
    Setup(0, "bf16", accumulation=2),
    Setup(1, "fp32", accumulation=2, weight_decay=0.1),
    Setup(1, "bf16", accumulation=2),
    Setup(2, "fp32", weight_decay=0.1),
    Setup(2, "bf16", offload=True, accumulation=2),
    Setup(3, "fp32", sub_group_size=700),
    Setup(3, "bf16", persistence=1000),
    Setup(3, "fp32", offload=True, persistence=1000, weight_decay=0.1),
    Setup(3, "bf16", offload=True, offload_parameters=True, persistence=1000),
    *([Setup(2, "fp16", accumulation=2), Setup(3, "fp16")] if FP16_HERE else []),
)


def test_a_resumed_run_is_the_same_in_every_bit(tmp_path: Path) -> None:
    straight = run_ranks(2, train_and_save, EXACT, tmp_path)
    resumed = run_ranks(2, resume, EXACT, tmp_path)
    for rank in (0, 1):
        for setup, one, other in zip(EXACT, straight[rank], resumed[rank], strict=True):
            state = other["state"]
            assert (state.step, state.corpus_hash, state.refused_steps) == (SAVED, "corpus", 1)
            assert state.loss_scale.get("cur_scale") == (512 if setup.precision == "fp16" else None)
            assert same(one["saved"], other["loaded"]), setup
            assert one["losses"] == other["losses"], setup
            assert same(one["last"], other["last"]), setup


@pytest.mark.parametrize(
    ("before", "after", "setups"),
    [
        (2, 1, [(1, 1), (2, 2), (3, 3)]),
        (2, 4, [(1, 1), (2, 2), (3, 3)]),
        (1, 2, [(1, 1), (2, 2), (3, 3)]),
        (2, 1, [(3, 0), (0, 2)]),
        (1, 2, [(2, 3), (0, 3)]),
    ],
)
def test_other_world_sizes_and_stages(
    before: int, after: int, setups: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Weights and moments are the same bits; what follows differs by the order of sums only."""
    wrote = [Setup(stage, weight_decay=0.1) for stage, _ in setups]
    reads = [Setup(stage, weight_decay=0.1, sub_group_size=900) for _, stage in setups]
    straight = run_ranks(before, train_and_save, wrote, tmp_path)[0]
    resumed = run_ranks(after, resume, reads, tmp_path)[0]
    for stages, one, other in zip(setups, straight, resumed, strict=True):
        assert same(one["saved"], other["loaded"]), stages
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-6), stages
        for name, tensor in one["last"]["weights"].items():
            torch.testing.assert_close(other["last"]["weights"][name], tensor, rtol=0, atol=3e-5, msg=name)


def full_disk(folder: Path) -> dict[str, Any]:
    """Rank 1 may not write files of more than 20 kB during the second save."""
    engine = tiny_engine(Setup(2))
    cluster = join_cluster()
    train_step(engine, 0)
    save(engine, folder, 1)
    train_step(engine, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cluster.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save(engine, folder, 2)
        error = ""
    except UserError as caught:
        error = str(caught)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    cluster.barrier()
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    older = find_resume_point(folder, "auto", cluster)
    cluster.barrier()
    save(engine, folder, 2)
    newer = find_resume_point(folder, "auto", cluster)
    engine.destroy()
    assert older is not None
    assert newer is not None
    return {"error": error, "left": left, "older": older.step, "newer": newer.step}


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(2, full_disk, tmp_path):
        final = tmp_path / "checkpoints" / "step-000002"
        assert f": checkpoint {final} could not be written: " in found["error"]
        assert found["error"].startswith("rank 1 on ")
        assert os.strerror(errno.EFBIG) in found["error"]
        assert "last complete one is" in found["error"]
        assert "step-000001" in found["error"]
        assert found["left"] == ["latest", "step-000001"]
        assert (found["older"], found["newer"]) == (1, 2)


def killed_saves(folder: Path) -> list[tuple[int, bool]]:
    """Kill a save at each of its calls to the file system that can matter, one after the other."""
    engine = tiny_engine(Setup(2))
    return kill_at_each_point(engine, folder, lambda: save(engine, folder, 2))


def kill_at_each_point(
    engine: DeepSpeedEngine, folder: Path, save_again: Callable[[], object]
) -> list[tuple[int, bool]]:
    """After a save of step 1, kill ``save_again``, of step 2, at its first, second, ... point.

    Returns:
        for each point the step of the newest checkpoint, which can be loaded, and whether there was a kill.
    """
    train_step(engine, 0)
    save(engine, folder, 1)
    train_step(engine, 1)
    found: list[tuple[int, bool]] = []
    for point in range(1, 100):
        child = os.fork()
        if child == 0:
            die_at(point)
            save_again()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        checkpoint = newest_verified(folder, join_cluster())
        assert checkpoint is not None
        load_checkpoint(engine, checkpoint, join_cluster())
        found.append((checkpoint.step, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL))
        if not os.WIFSIGNALED(status):
            break
        shutil.rmtree(folder / "checkpoints" / "step-000002", ignore_errors=True)
    engine.destroy()
    return found


def die_at(point: int) -> None:
    """Die by SIGKILL just before the ``point``-th sync, rename or replacement."""
    counted = 0

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    os.fsync, os.rename, os.replace = dying(os.fsync), dying(os.rename), dying(os.replace)


def test_a_save_killed_at_any_point_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    (found,) = run_ranks(1, killed_saves, tmp_path)
    assert len(found) > 6, "syncs of each file and folder, and the renames"
    assert found[0] == (1, True)
    assert found[-1] == (2, False)
    steps = [step for step, _ in found]
    assert steps == sorted(steps), "complete from one point on"


def another_model(folder: Path) -> str:
    engine = tiny_engine(Setup(2))
    save(engine, folder, 1)
    engine.destroy()
    engine = tiny_engine(Setup(2), MaskedLM(tiny_bert(layers=3)))
    cluster = join_cluster()
    checkpoint = find_resume_point(folder, "auto", cluster)
    assert checkpoint is not None
    with pytest.raises(UserError) as caught:
        load_checkpoint(engine, checkpoint, cluster)
    engine.destroy()
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(2, another_model, tmp_path):
        assert "step-000001 is of another model: bert.encoder.layer.2." in message
        assert "no such parameter in the checkpoint" in message


def frozen_and_unstepped(folder: Path, stage: int) -> dict[str, Tensor]:
    """A checkpoint before the first step, of a model with a frozen layer; everything is in it."""
    from dga_scale.storage.safetensors_stream import SegmentReader

    lm = tiny_bert()
    lm.bert.encoder.layer[0].requires_grad_(False)
    engine = tiny_engine(Setup(stage), MaskedLM(lm))
    cluster = join_cluster()
    save(engine, folder, 0)
    checkpoint = find_resume_point(folder, "auto", cluster)
    assert checkpoint is not None
    assert load_checkpoint(engine, checkpoint, cluster).step == 0
    train_step(engine, 0)
    engine.destroy()
    with SegmentReader(checkpoint.shards) as reader:
        return {key: reader.full(key) for key in reader.stored}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_are_in_it_and_moments_only_after_a_step(stage: int, tmp_path: Path) -> None:
    expected = {f"weight:{name}": p.detach() for name, p in tiny_bert().named_parameters()}
    found = run_ranks(2, frozen_and_unstepped, tmp_path, stage)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
