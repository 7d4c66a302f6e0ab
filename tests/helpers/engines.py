"""What a real DeepSpeed engine holds, in bytes: for the tests and for benchmarks/plan_accuracy.py."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from dga_scale.zero.shards import local_shards


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages behind tensors, each once, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def held_bytes(engine: DeepSpeedEngine) -> dict[str, int]:
    """Bytes of this rank after a step, by the names of ``planning.memory.States``.

    ``gradients`` is 0 where they live in parameters and lists, which are empty after the step.
    """
    parameters: list[Any] = list(engine.module.parameters())
    sharded = engine.zero_optimization_stage() == 3
    weights = storages(p.ds_tensor if sharded else p for p in parameters)
    whole = storages(p for p in parameters if p.data.numel() == p.ds_numel) if sharded else {}
    stepped = [shard.stepped for shard in local_shards(engine)]
    moments = [engine.basic_optimizer.state[t][key] for t in stepped for key in ("exp_avg", "exp_avg_sq")]
    masters = {at: size for at, size in storages(stepped).items() if at not in weights}
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    flats = [flat] if flat is not None else getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    return {
        "weights": sum(weights.values()),
        "persistent": sum(size for at, size in whole.items() if at not in weights),
        "masters": sum(masters.values()),
        "moments": sum(storages(moments).values()),
        "gradients": sum(storages(flats).values()),
    }


def saved_bytes(module: torch.nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Run a forward pass: its result, and bytes of what it keeps for the backward pass besides weights."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # Only now: ZeRO-3 may leave weights that it has gathered for the backward pass.
    own = storages([*module.parameters(), *module.buffers()])
    return output, sum(size for at, size in storages(kept).items() if at not in own)
