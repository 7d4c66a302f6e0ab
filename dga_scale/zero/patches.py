"""All that this program changes inside DeepSpeed: each change with its reason, and none on another version.

A patch reaches into code that its authors may rewrite at any time, so each one first checks the version: on
one that it was not tested with it ends the run instead of changing something else. For each,
``tests/zero/test_patches.py`` shows that DeepSpeed, left alone, still does what the patch is there for; once
that test fails, the patch can go.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import compiler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dga_scale.errors import UserError

TESTED = ("0.19.8",)
"""The versions of DeepSpeed that the patches were tested with."""


def check_version() -> None:
    """Refuse a DeepSpeed that the patches were not tested with.

    Raises:
        UserError: Another version is installed; the message names it and those that work.

    """
    if deepspeed.__version__ not in TESTED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is installed; dga_scale changes what DeepSpeed does at five "
            f"places, and was tested with {', '.join(TESTED)} only: pip install deepspeed=={TESTED[-1]}"
        )


@contextlib.contextmanager
def no_shared_memory_reduce() -> Iterator[None]:
    """Within, DeepSpeed starts its communication on CPUs without compiling a shared-memory all-reduce.

    It costs 40 s of g++ on each fresh machine, for an operation that only inference calls.
    """
    check_version()
    # ``deepspeed.comm.torch`` as an attribute is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    build = module.build_shm_op
    module.build_shm_op = lambda: None
    try:
        yield
    finally:
        module.build_shm_op = build


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's optimizer Muon, which its ZeRO compares ours with, and leave it uncompiled.

    Nobody calls it; ``torch.compile`` would import the whole of Inductor to wrap it, for over a second.
    """
    check_version()
    compiling = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiling


def patch_engine(engine: DeepSpeedEngine) -> None:
    """Patch a new engine's optimizer: Adam's first step, and steps on a NaN or infinity.

    DeepSpeed checks the global gradient norm before each step and leaves the step out on all ranks where it
    is not finite: no weight, no moment and no step count changes. Two gaps in that are closed here: ZeRO-0 in
    fp32, where it calls the torch optimizer as it is, and ZeRO-1 and 2 with optimizer offload, where a
    refused step's gradients stay in the accumulator and poison all later ones.
    """
    check_version()
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        forget_first_step(engine.basic_optimizer)
    elif engine.optimizer is engine.basic_optimizer:
        guard_stage_zero(engine)
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer) and engine.optimizer.cpu_offload:
        forget_refused_gradients(engine.optimizer)


def forget_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Take back the step with zero gradients that ``FP16_UnfusedOptimizer`` takes as it is made.

    It would count as Adam's first step, and its bias correction would be that of the second.
    """
    optimizer.state.clear()


def forget_refused_gradients(optimizer: Any) -> None:
    """Drop the accumulated gradients with the other buffers of a step; after a good step they are gone.

    DeepSpeed does so after a refused one without offload only.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_all


def guard_stage_zero(engine: DeepSpeedEngine) -> None:
    """Give ZeRO-0 in fp32 a gradient norm, and no step where it is not finite, as the other stages have.

    DeepSpeed reads ``overflow`` and ``_global_grad_norm`` off the optimizer, where it has them.
    """
    optimizer: Any = engine.optimizer
    unguarded = optimizer.step
    limit = engine.gradient_clipping()

    def step() -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer._global_grad_norm = norm
        optimizer.overflow = not bool(torch.isfinite(norm))
        if not optimizer.overflow:
            if limit > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            unguarded()

    optimizer.step = step
    engine.clip_fp32_gradients = lambda: None  # done in the step, after the norm was checked
