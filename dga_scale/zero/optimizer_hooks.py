"""Hooks around the optimizer's step: masks on the shards it steps, idle parameters, refused steps."""

from collections.abc import Callable, Collection, Sequence
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


def leave_idle(engine: DeepSpeedEngine, idle: Callable[[], Collection[str]], moments: Sequence[str]) -> None:
    """Leave parameters as they are, to the last bit, in each step that ``idle()`` names them for.

    Adam moves a parameter without a gradient by its old moments, and by weight decay. An idle one keeps its
    weights and moments: they are copied before the step and written back after it, in memory of their size.
    The optimizer counts the step all the same, as it has one count for a whole flat partition: its bias
    correction goes by the steps of the run (as in torch's ``SparseAdam``).

    Args:
        engine: The engine.
        idle: The function that names the parameters, as in the Hugging Face model; it is called right before
            each step of the base optimizer, and answers alike on all ranks. A refused step does not call it.
        moments: The names of the tensors that the optimizer's state holds for each entry.

    """
    shards = {id(shard.stepped): shard for shard in local_shards(engine)}
    kept: list[tuple[Tensor, slice, Fragment, Tensor, dict[str, Tensor]]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = idle()
        for stepped in (p for group in optimizer.param_groups for p in group["params"]):
            shard, state = shards[id(stepped)], optimizer.state.get(stepped, {})
            for offset, fragment in zip(shard.offsets, shard.fragments, strict=True):
                if fragment.name not in names:
                    continue
                where = slice(offset, offset + fragment.values.numel())
                copies = {name: state[name].view(-1)[where].clone() for name in moments if name in state}
                kept.append((stepped, where, fragment, fragment.values.clone(), copies))

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for stepped, where, fragment, weights, copies in kept:
            fragment.values.copy_(weights)
            for name in moments:
                moment = optimizer.state[stepped][name].view(-1)[where]
                moment.copy_(copies[name] if name in copies else torch.zeros_like(moment))
        kept.clear()

    engine.basic_optimizer.register_step_pre_hook(before)
    engine.basic_optimizer.register_step_post_hook(after)


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
