"""The shards of each parameter on this rank, for every ZeRO stage and precision.

The one place that knows DeepSpeed's optimizers from inside. What they keep, per class (DeepSpeed 0.19.8):

====================  ===========================================================================
stage 0, fp32         no wrapper: the torch optimizer steps the parameters themselves
stage 0, bf16         ``FP16_UnfusedOptimizer``: one fp32 copy a parameter, whole on every rank
stage 1, bf16, fp32   ``BF16_Optimizer``: per group a flat fp32 partition; ``parameter._hp_mapping``
  accumulation          says which stretch of the parameter lies where in it
stages 1, 2           ``DeepSpeedZeroOptimizer``: the same mapping
stage 3               ``DeepSpeedZeroOptimizer_Stage3``: per sub-group a flat fp32 tensor, the
                        rank's equal share of each parameter one after the other, zero-padded
====================  ===========================================================================
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from dga_scale.preservation.fragments import Fragment

Names = dict[Tensor, tuple[str, tuple[int, ...]]]
"""The name and full shape of each parameter."""

LANGUAGE_MODEL_PREFIX = "lm."
"""The prefix of the Hugging Face model's parameters in ``TrainingModel``; fragments are named without it."""


@dataclass(frozen=True)
class Shard:
    """A tensor that the base optimizer steps on this rank, and the fragments of parameters in it.

    Attributes:
        stepped: The tensor in the optimizer's ``param_groups``, which keys its state.
        fragments: The fragments, in their order in ``stepped``; padding belongs to none.
        offsets: The offset at which each fragment starts in the flattened ``stepped``.

    """

    stepped: Tensor
    fragments: tuple[Fragment, ...]
    offsets: tuple[int, ...]


def local_shards(engine: DeepSpeedEngine) -> list[Shard]:
    """List the shards that this rank's optimizer steps, as views: writing to a fragment sets the weights."""
    names: Names = {
        parameter: (name.removeprefix(LANGUAGE_MODEL_PREFIX), shape_of(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return [
            _whole(p, p, *names[p]) for group in engine.basic_optimizer.param_groups for p in group["params"]
        ]
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [
            _whole(p, master, *names[p]) for low, high in pairs for p, master in zip(low, high, strict=True)
        ]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _mapped(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, names)
    if isinstance(optimizer, BF16_Optimizer):
        return _mapped(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, names)
    assert isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3), type(optimizer)
    groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    return [_partitioned(flat, parameters, names) for flat, parameters in groups]


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the full shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(parameter: Tensor, stepped: Tensor, name: str, shape: tuple[int, ...]) -> Shard:
    return Shard(stepped, (Fragment(name, 0, shape, stepped.data.view(-1)),), (0,))


def _mapped(flats: list[Tensor], groups: list[list[Any]], names: Names) -> list[Shard]:
    shards = []
    for flat, parameters in zip(flats, groups, strict=True):
        located: list[tuple[int, Fragment]] = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                values = flat.data.narrow(0, offset, mapping.hp_fragment_address.numel)
                name, shape = names[parameter]
                located.append((offset, Fragment(name, start, shape, values)))
        located.sort(key=lambda each: each[0])
        shards.append(Shard(flat, tuple(f for _, f in located), tuple(o for o, _ in located)))
    return shards


def _partitioned(flat: Tensor, parameters: list[Any], names: Names) -> Shard:
    fragments, offsets, offset = [], [], 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = share * torch.distributed.get_rank(parameter.ds_process_group)
        length = min(share, parameter.ds_numel - start)
        if length > 0:  # the last ranks' shares of a small parameter are all padding
            name, shape = names[parameter]
            fragments.append(Fragment(name, start, shape, flat.data.narrow(0, offset, length)))
            offsets.append(offset)
        offset += share
    return Shard(flat, tuple(fragments), tuple(offsets))


def equal_share(length: int) -> tuple[int, int]:
    """Return the start and the end of this rank's equal share of ``length`` entries."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return length * rank // ranks, length * (rank + 1) // ranks


@torch.no_grad()
def keep_frozen_weights(engine: DeepSpeedEngine, originals: dict[str, Tensor]) -> None:
    """Keep this rank's share of the language model's frozen weights as they were before rounding to 16 bits.

    Args:
        engine: The engine.
        originals: The fp32 tensors by their names in the engine's module; empty where they were partitioned
            as they were loaded (ZeRO-3), which rounds them.

    """
    engine.frozen_originals = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad and name.startswith(LANGUAGE_MODEL_PREFIX) and name in originals:
            flat = originals[name].reshape(-1)
            start, stop = equal_share(len(flat))
            engine.frozen_originals[name] = flat[start:stop].cpu().clone()


def frozen_shares(engine: DeepSpeedEngine) -> Iterator[tuple[str, int, tuple[int, ...], Tensor]]:
    """Yield this rank's share of each weight of the language model that no optimizer steps.

    Yields:
        The weight's name in the Hugging Face model, where in the flattened weight the share starts, the full
        shape, and the share (n,), n >= 1.

    """
    originals = getattr(engine, "frozen_originals", {})
    parameter: Any
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or not name.startswith(LANGUAGE_MODEL_PREFIX):
            continue  # a teacher is not saved: it is loaded from the starting model
        if name in originals:
            start, _ = equal_share(torch.Size(shape_of(parameter)).numel())
            values = originals[name]
        elif hasattr(parameter, "ds_tensor"):
            start = parameter.partition_numel() * torch.distributed.get_rank()
            length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
            values = parameter.ds_tensor.data.view(-1)[:length]
        else:
            start, stop = equal_share(parameter.numel())
            values = parameter.data.view(-1)[start:stop]
        if values.numel():
            yield name.removeprefix(LANGUAGE_MODEL_PREFIX), start, shape_of(parameter), values


@torch.no_grad()
def refresh_model_weights(engine: DeepSpeedEngine) -> None:
    """Copy the fragments into the weights of the forward passes, after something wrote into them."""
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return  # they are the same tensors
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master.data)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:  # small ones that every rank keeps whole: let go, and gather anew
            optimizer._partition_all_parameters()
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()
