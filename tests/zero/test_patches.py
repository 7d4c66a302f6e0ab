"""The patches of DeepSpeed's inside: each is refused on another version, and each is still needed.

A test here that fails after an update of DeepSpeed says that its patch can go.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch

from dga_scale.errors import UserError
from dga_scale.zero import engine as engine_module
from dga_scale.zero import patches
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Setup, full_weights, tiny_engine, train_step


@pytest.mark.parametrize(
    "patch",
    [
        patches.check_version,
        patches.import_muon_uncompiled,
        lambda: patches.patch_engine(None),
        lambda: patches.no_shared_memory_reduce().__enter__(),
    ],
    ids=["check_version", "import_muon_uncompiled", "patch_engine", "no_shared_memory_reduce"],
)
def test_another_version_is_refused(patch: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.99")
    with pytest.raises(UserError, match=r"DeepSpeed 0\.19\.99 is installed.*pip install deepspeed=="):
        patch()


def _count(program: str) -> int:
    """Run a program in a new interpreter, since both patches act on a first import; the number it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_deepspeed_compiles_a_shared_memory_reduce_as_it_connects() -> None:
    program = (
        "import importlib, torch.distributed as dist, deepspeed\n"
        "module, calls = importlib.import_module('deepspeed.comm.torch'), []\n"
        "module.build_shm_op = lambda: calls.append(1)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "{}"
        "print(len(calls))"
    )
    connect = "deepspeed.init_distributed(dist_backend='gloo', auto_mpi_discovery=False, verbose=False)\n"
    assert _count(program.format(connect)) > 0
    ours = "from dga_scale.zero.engine import connect_deepspeed\nconnect_deepspeed()\n"
    assert _count(program.format(ours)) == 0


def test_deepspeed_compiles_muon_as_it_is_imported() -> None:
    program = (
        "from deepspeed.runtime import compiler\n"
        "calls = []\n"
        "compiler.compile = lambda *a, **k: calls.append(1) or (lambda function: function)\n"
        "{}"
        "print(len(calls))"
    )
    assert _count(program.format("import deepspeed.runtime.zero.muon.original_muon\n")) > 0
    ours = "from dga_scale.zero.patches import import_muon_uncompiled\nimport_muon_uncompiled()\n"
    assert _count(program.format(ours)) == 0


def _without_patches(setup: Setup, use: Callable[[Any], Any]) -> Any:
    """What ``use`` finds of an engine as DeepSpeed makes it."""
    patch = engine_module.patch_engine
    engine_module.patch_engine = lambda engine: None
    try:
        engine = tiny_engine(setup)
        found = use(engine)
        engine.destroy()
    finally:
        engine_module.patch_engine = patch
    return found


def _steps_counted(engine: Any) -> list[float]:
    return [float(state["step"]) for state in engine.basic_optimizer.state.values()]


def test_unfused_optimizer_takes_a_step_as_it_is_made() -> None:
    counts = run_ranks(1, _without_patches, Setup(0, "bf16"), _steps_counted)[0]
    assert counts
    assert set(counts) == {1.0}


def _nan_then_finite(engine: Any) -> bool:
    """Whether all weights are numbers after a step on a NaN and one without."""
    train_step(engine, 0, "loss")
    train_step(engine, 1)
    return all(bool(torch.isfinite(weight).all()) for weight in engine.module.parameters())


def _step_counts_after_a_nan(engine: Any) -> tuple[int, bool]:
    train_step(engine, 0)
    before = full_weights(engine)
    train_step(engine, 1, "loss")
    train_step(engine, 2)
    after = full_weights(engine)
    return engine.skipped_steps, any(not torch.equal(before[name], after[name]) for name in before)


def test_stage_zero_steps_on_a_nan() -> None:
    assert run_ranks(1, _without_patches, Setup(0, "fp32"), _nan_then_finite) == [False]


def test_offload_keeps_the_gradients_of_a_refused_step() -> None:
    """With them all later steps are refused: nothing moves any more."""
    setup = Setup(2, "bf16", accumulation=2, offload=True)
    skipped, moved = run_ranks(1, _without_patches, setup, _step_counts_after_a_nan)[0]
    assert skipped == 2
    assert not moved
