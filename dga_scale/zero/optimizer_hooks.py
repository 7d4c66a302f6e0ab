"""Hooks around the optimizer's step: masks on the shards it steps, and steps that are refused."""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.stepped_weights import Hook
from dga_scale.zero.shards import local_shards


def local_fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """List the fragments of parameters that this rank's optimizer steps, as views into its fp32 weights.

    Names are those of the Hugging Face model. Over all ranks every entry of every trained parameter occurs
    once; in ZeRO-0 once on each rank.
    """
    return [fragment for shard in local_shards(engine) for fragment in shard.fragments]


def wrap_optimizer_step(engine: DeepSpeedEngine, before: Hook, after: Hook) -> None:
    """Call ``before`` and ``after`` right around each step of the base optimizer, with what it steps there.

    ZeRO-1 and 2 step one parameter group at a time, ZeRO-3 one sub-group: the pair is called once for each,
    with that part's fragments. A refused step calls neither.
    """
    fragments = {id(shard.stepped): shard.fragments for shard in local_shards(engine)}

    def stepped(optimizer: torch.optim.Optimizer) -> list[Fragment]:
        return [f for group in optimizer.param_groups for p in group["params"] for f in fragments[id(p)]]

    engine.basic_optimizer.register_step_pre_hook(lambda optimizer, *_: before(stepped(optimizer)))
    engine.basic_optimizer.register_step_post_hook(lambda optimizer, *_: after(stepped(optimizer)))


class EngineWeights:
    """The weights that an engine's optimizer steps on this rank: the ``SteppedWeights`` of protection."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    def fragments(self) -> list[Fragment]:
        """Return ``local_fragments`` of the engine."""
        return local_fragments(self._engine)

    def around_steps(self, before: Hook, after: Hook) -> None:
        """Call ``wrap_optimizer_step`` on the engine."""
        wrap_optimizer_step(self._engine, before, after)


def add_to_gradients(engine: DeepSpeedEngine, add: Callable[[Fragment, Tensor], None]) -> None:
    """Call ``add(fragment, gradient)`` for all that the base optimizer steps, right before each step of it.

    The gradient is a view (n,) of what the optimizer will read: fp32, reduced over ranks, unscaled and
    clipped. In every class of optimizer it is the ``grad`` of the tensor stepped; a parameter of ZeRO-0 that
    no loss has reached has none, makes no step, and is skipped. A refused step calls nothing.
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
    """Return whether the last ``engine.step()`` at an accumulation boundary left the weights as they were.

    All ranks give the same answer. ``engine.skipped_steps`` counts them.
    """
    return not engine.was_step_applied()
