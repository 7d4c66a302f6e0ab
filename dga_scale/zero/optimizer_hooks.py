"""What happens around the optimizer's step: masks on the shards it steps, and no step on a NaN or infinity.

DeepSpeed 0.19.8 looks at the global gradient norm before each step and leaves the step out on all ranks where
it is not finite: no weight, no moment and no step count changes. Two gaps in that are closed here: ZeRO-0 in
fp32, where it calls the torch optimizer as it is, and ZeRO-1 and 2 with optimizer offload, where a refused
step's gradients stay in the accumulator and poison all later ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from dga_scale.preservation.fragments import Fragment
from dga_scale.zero.shards import local_shards

Mask = Callable[[Sequence[Fragment]], None]


def local_fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """List all pieces of parameters that this rank's optimizer steps, as views into its fp32 weights.

    Names are those of the Hugging Face model. Over all ranks every entry of every trained parameter occurs
    once; in ZeRO-0 once on each rank.
    """
    return [fragment for shard in local_shards(engine) for fragment in shard.fragments]


def wrap_optimizer_step(engine: DeepSpeedEngine, before: Mask, after: Mask) -> None:
    """Call ``before`` and ``after`` right around each step of the base optimizer, with what it steps there.

    ZeRO-1 and 2 step one parameter group at a time, ZeRO-3 one sub-group: the pair is called once for each,
    with that part's fragments. A refused step calls neither.
    """
    fragments = {id(shard.stepped): shard.fragments for shard in local_shards(engine)}

    def stepped(optimizer: torch.optim.Optimizer) -> list[Fragment]:
        return [f for group in optimizer.param_groups for p in group["params"] for f in fragments[id(p)]]

    engine.basic_optimizer.register_step_pre_hook(lambda optimizer, *_: before(stepped(optimizer)))
    engine.basic_optimizer.register_step_post_hook(lambda optimizer, *_: after(stepped(optimizer)))


def add_to_gradients(engine: DeepSpeedEngine, add: Callable[[Fragment, Tensor], None]) -> None:
    """Call ``add(fragment, gradient)`` for all that the base optimizer steps, right before each step of it.

    The gradient is a view (n,) of what the optimizer will read: fp32, reduced over ranks, unscaled and
    clipped. In every class of optimizer it is the ``grad`` of the tensor stepped; a parameter of ZeRO-0 that
    no loss has reached has none, makes no step, and is passed over. A refused step calls nothing.
    """
    shards = {id(shard.stepped): shard for shard in local_shards(engine)}

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for stepped in (p for group in optimizer.param_groups for p in group["params"]):
            if stepped.grad is None:
                continue
            gradient, shard = stepped.grad.view(-1), shards[id(stepped)]
            for offset, fragment in zip(shard.offsets, shard.fragments, strict=True):
                add(fragment, gradient[offset : offset + fragment.values.numel()])

    engine.basic_optimizer.register_step_pre_hook(before)


def backward(engine: DeepSpeedEngine, loss: Tensor) -> None:
    """Run ``engine.backward``; a loss that is not finite makes the gradient so: all ranks refuse the step.

    The factor is 1 for a finite loss, which changes no bit, and NaN for a NaN or an infinity: it reaches the
    other ranks in the reduction that takes place anyway, and no device has to be waited for.
    """
    value = loss.detach()
    engine.backward(loss * (1 + (value - value)))


def step_was_refused(engine: DeepSpeedEngine) -> bool:
    """Tell whether the last ``engine.step()`` at an accumulation boundary left the weights as they were.

    All ranks give the same answer. ``engine.skipped_steps`` counts them.
    """
    return not engine.was_step_applied()


def close_gaps(engine: DeepSpeedEngine) -> None:
    """Make refused steps the same in every stage; on a new engine."""
    if engine.optimizer is engine.basic_optimizer:
        _guard_stage_zero(engine)
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer) and engine.optimizer.cpu_offload:
        _forget_refused_gradients(engine.optimizer)


def _forget_refused_gradients(optimizer: Any) -> None:
    """Drop the accumulated gradients with the other buffers of a step; after a good step they are gone.

    DeepSpeed does so after a refused one without offload only.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_all


def _guard_stage_zero(engine: DeepSpeedEngine) -> None:
    """Give ZeRO-0 in fp32 what the other stages have: a gradient norm, and no step where it is not finite.

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
    engine.clip_fp32_gradients = lambda: None  # done in the step, after the norm was looked at
