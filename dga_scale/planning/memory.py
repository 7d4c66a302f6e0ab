"""Estimate the memory of one rank: weights, optimizer, gradients and DeepSpeed's buffers; and its peak.

The states follow the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3.1): in mixed precision with
Adam, 2 bytes of weights, 2 of gradients and K = 12 of master and moments an entry; stage 1 spreads K, stage 2
the gradients too, and stage 3 all three over the ranks. What DeepSpeed 0.19 keeps besides (padding,
buckets, fp32 gradients of a step) was read in its source and is held against real engines in the tests.
"""

import math
from dataclasses import dataclass
from typing import Any

from dga_scale.planning.activations import (
    Batch,
    activations,
    cached_states,
    gathered_keys,
    vocabulary,
    working_memory,
)
from dga_scale.planning.models import PlannedModel
from dga_scale.zero.ds_config import ResolvedConfig
from dga_scale.zero.optimizers import optimizer_kind


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed that determine the memory of a rank, for a number of ranks."""

    stage: int
    ranks: int
    weight_bytes: int
    accumulation_bytes: int
    communication_bytes: int
    offload_optimizer: bool
    offload_parameters: bool
    reduce_bucket: int
    overlap: bool
    all_reduce: bool
    """Whether ZeRO-1 and 2 all-reduce gradients, of which each rank keeps its share (DeepSpeed's default)."""
    live: int
    persistence: int
    sub_group: int
    moments: int = 2
    """fp32 numbers that the optimizer keeps for each entry: Adam's two."""

    @classmethod
    def of(cls, resolved: ResolvedConfig, ranks: int) -> "Zero":
        """Read a resolved configuration; keys left out have DeepSpeed's defaults."""
        ds, zero = resolved.ds_config, resolved.ds_config["zero_optimization"]
        size = {"fp32": 4, "bf16": 2, "fp16": 2}
        weight = size[resolved.precision]

        def width(name: Any, default: int) -> int:
            return size.get(name, default)

        overlap = zero.get("overlap_comm")
        return cls(
            stage=resolved.zero_stage,
            ranks=ranks,
            weight_bytes=weight,
            accumulation_bytes=width((ds.get("data_types") or {}).get("grad_accum_dtype"), weight),
            communication_bytes=width(ds.get("communication_data_type"), weight),
            offload_optimizer=resolved.offload_optimizer,
            offload_parameters=resolved.offload_parameters,
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=resolved.zero_stage == 3 if overlap is None else bool(overlap),
            all_reduce=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            moments=len(optimizer_kind(resolved.config.optimization.optimizer).moments),
        )


@dataclass(frozen=True)
class States:
    """The bytes that a rank keeps from the first step to the last, on GPU or host.

    Attributes:
        weights: The model's weights, in 16 bits or fp32; under ZeRO-3 this rank's shares.
        persistent: The small parameters that ZeRO-3 keeps whole on each rank.
        masters: The optimizer's fp32 weights, where they are not the model's weights themselves.
        moments: What the optimizer keeps of each entry, fp32: Adam has two moments.
        gradients: The gradients that are kept between micro-batches.
    """

    weights: int
    persistent: int
    masters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """The sum of all states."""
        return self.weights + self.persistent + self.masters + self.moments + self.gradients


def share(model: PlannedModel, zero: Zero, groups: bool = True) -> int:
    """Count the entries that one rank's optimizer steps, padding included.

    ZeRO-1 and 2 flatten each of AdamW's groups and pad it to a multiple of twice the ranks; ZeRO-3 pads every
    parameter to a multiple of the ranks.

    Args:
        model: The model, for its trained parameters.
        zero: The stage and ranks.
        groups: Whether matrices and other parameters are separate groups, as with weight decay.
    """
    if zero.stage == 0:
        return model.trained_parameters
    if zero.stage == 3:
        return sum(math.ceil(model.sizes[name] / zero.ranks) for name in model.trained)
    name_groups = (model.decayed, model.trained - model.decayed) if groups else (model.trained,)
    align = 2 * zero.ranks
    return sum(math.ceil(sum(model.sizes[name] for name in group) / align) * 2 for group in name_groups)


def states(model: PlannedModel, zero: Zero, groups: bool = True) -> States:
    """Count a rank's states as in the ZeRO paper, section 3.1 and figure 1, with DeepSpeed's padding."""
    width, own = zero.weight_bytes, share(model, zero, groups)
    trained = model.trained_parameters
    sharded = zero.stage == 3
    weights = model.parameters * width
    persistent = 0
    if sharded:
        weights = sum(math.ceil(size / zero.ranks) for size in model.sizes.values()) * width
        small = (size for size in model.sizes.values() if size <= zero.persistence)
        persistent = sum(small) * width
    elif zero.stage:
        weights = own * zero.ranks * width + (model.parameters - trained) * width
    mixed = width == 2
    # In fp32 without ZeRO the optimizer steps the weights themselves; any stage of ZeRO copies them.
    masters = 4 * own if mixed or zero.stage else 0
    if zero.stage >= 2:
        gradients = own * zero.accumulation_bytes
    elif zero.stage == 1 and mixed and zero.accumulation_bytes == 4:
        gradients = own * zero.ranks * 4  # BF16_Optimizer: an fp32 gradient of the whole model
    else:
        gradients = trained * width
    return States(weights, persistent, masters, 4 * zero.moments * own, gradients)


def extras(model: PlannedModel, zero: Zero, soft_mask: str) -> dict[str, int]:
    """Count the bytes that the method keeps on a rank in addition, by name.

    A teacher is a second model in the weights' precision, spread like the weights in ZeRO-3. Anchors keep the
    starting weights, EWC the Fisher too, in fp32 beside the entries that the rank steps. Soft-masks remember
    where the units' own rows started.
    """
    found = {}
    if model.method.needs_teacher:
        found["teacher"] = model.parameters * zero.weight_bytes // (zero.ranks if zero.stage == 3 else 1)
    plan = model.method.weight_regularisation()
    if plan is not None:
        found["weight_regularisation"] = (4 if plan.fisher_samples is None else 8) * share(model, zero)
    if soft_mask != "none" and model.owned:
        found["movement"] = 4 * model.owned // (zero.ranks if zero.stage else 1)
    return found


@dataclass(frozen=True)
class Memory:
    """The bytes of one rank by their purpose: ``device`` on the GPU, ``host`` in the host's memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        """The peak bytes on the GPU."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """The bytes in the host's memory."""
        return sum(self.host.values())


def memory(
    model: PlannedModel,
    zero: Zero,
    batch: Batch,
    *,
    checkpointing: bool,
    micro_steps: int = 1,
    soft_mask: str = "none",
    groups: bool = True,
    async_save: bool = False,
) -> Memory:
    """Add up a rank's memory at its peak.

    The peak is at the logits (all activations, no gradients yet, unless earlier micro-batches left some); in
    the backward pass of the last block (the largest gradient too, tied embeddings', and the buckets, which
    the first gradient calls for); at the end of the backward pass (tied embeddings' gradients add up; or all
    gradients, some on their way to other ranks); where gradients are made ready for the optimizer (once more
    flat, and in fp32); in its step (what masks keep aside too); or where the keys of a contrast over all
    passes are gathered.
    """
    kept, own, width = states(model, zero, groups), share(model, zero, groups), zero.weight_bytes
    always = {
        "weights": kept.weights + kept.persistent,
        "master weights": kept.masters,
        "moments": kept.moments,
    }
    host, gradients = {}, kept.gradients
    if zero.offload_optimizer:
        host = {name: always.pop(name) for name in ("master weights", "moments")}
        host["gradients"] = 4 * own
        gradients = 2 * model.largest * width if zero.stage >= 2 else gradients
    if zero.offload_parameters:
        host["weights"], always["weights"] = kept.weights, kept.persistent
    if async_save:  # weights and moments of what this rank writes: an equal share in every stage
        frozen = sum(model.sizes.values()) - model.trained_parameters
        host["copy for a save"] = (12 * model.trained_parameters + 4 * frozen) // zero.ranks
    for name, size in extras(model, zero, soft_mask).items():
        # A teacher lies where the weights do, the others beside what the optimizer steps.
        offloaded = zero.offload_parameters if name == "teacher" else zero.offload_optimizer
        (host if offloaded else always)[name] = size
    buffered = zero.stage == 3 or (zero.stage == 1 and width < zero.accumulation_bytes)
    staged, cast = _buckets(model, zero)
    cached = cached_states(model, batch, micro_steps)
    keys = gathered_keys(model, batch, zero.ranks, micro_steps)
    held = {
        "gradients": gradients if buffered or micro_steps > 1 else 0,
        "gathered weights": gathered_weights(model, zero),
        "activations": activations(model, batch, width, checkpointing),
        "keys of the contrast": cached or keys,
    }
    head = {**held, "logits": vocabulary(model, batch, width)}
    blocks = {
        **held,
        "gradients": held["gradients"] + width * model.largest,
        "buckets": staged if zero.stage else 0,
        "work on a block": working_memory(model, batch, width, checkpointing),
    }
    on_their_way = width * _reduced_at_once(model, zero) if zero.stage >= 2 else 0
    ends = {
        "gradients": gradients + on_their_way,
        "buckets": staged + cast,
        # ZeRO-3 lets go of each block on its way back; the embeddings' gradient is the last.
        "gathered weights": min(held["gathered weights"], width * model.largest),
    }
    # The LM head's gradient of tied embeddings, the lookup's, and their sum.
    tied = {**ends, "gradients": gradients + 2 * width * model.largest * model.tied, "buckets": staged}
    if zero.stage == 3:  # whose gradients are shares
        tied["gradients"] += width * model.largest
    flat, fp32 = _step(zero, own)
    ready = {"gradients": gradients + flat, "fp32 gradients of the step": fp32}
    # ZeRO-1 and 2 let go of the 16-bit gradients before the optimizer steps.
    step = {"gradients": 0 if zero.stage in (1, 2) else gradients, "fp32 gradients of the step": fp32}
    if soft_mask == "update" and not zero.offload_optimizer:
        step["masked weights of the step"] = 8 * model.masked // (zero.ranks if zero.stage else 1)
    # Before a contrast over all micro-batches is cached there are no activations and no gradients.
    first = {"keys of the contrast": cached + keys}
    peak = max(head, blocks, tied, ends, ready, step, first, key=lambda moment: sum(moment.values()))
    return Memory({name: size for name, size in {**always, **peak}.items() if size}, host)


def _reduced_at_once(model: PlannedModel, zero: Zero) -> int:
    """Count the entries of gradients reduced in one call: a bucket, or a parameter that is larger."""
    return min(max(zero.reduce_bucket, model.largest), model.trained_parameters)


def _buckets(model: PlannedModel, zero: Zero) -> tuple[int, int]:
    """Count the bytes of the gradient buckets, and of the copies made to reduce one.

    There is one copy in the communication's precision, if that differs; ZeRO-3 makes one more by rank.
    """
    cast = zero.communication_bytes if zero.communication_bytes != zero.weight_bytes else 0
    if zero.stage == 0:  # DeepSpeed's own, filled after the backward pass
        entries = min(500_000_000, model.trained_parameters)
        return entries * zero.weight_bytes, entries * cast
    copies = 2 if zero.overlap and zero.stage < 3 else 1
    if zero.stage == 3:
        cast += zero.communication_bytes
    moved = _reduced_at_once(model, zero) * (zero.ranks > 1 or zero.stage == 3)
    return zero.reduce_bucket * zero.weight_bytes * copies, moved * cast


def gathered_weights(model: PlannedModel, zero: Zero) -> int:
    """Count the bytes of weights that ZeRO-3 has gathered at once: max_live_parameters, or the largest one.

    A single rank gathers nothing, unless its weights come from the host.
    """
    if zero.stage < 3 or (zero.ranks == 1 and not zero.offload_parameters):
        return 0
    large = sum(size for size in model.sizes.values() if size > zero.persistence)
    return min(large, max(zero.live, model.largest)) * zero.weight_bytes


def _step(zero: Zero, own: int) -> tuple[int, int]:
    """Count the bytes of gradients prepared for the optimizer: flat, then in fp32; by sub-group in ZeRO-3."""
    if zero.offload_optimizer or (zero.weight_bytes == 4 and zero.stage == 0):
        return 0, 0
    entries = min(zero.sub_group, own) if zero.stage == 3 else own
    return entries * (zero.accumulation_bytes if zero.stage else 0), 4 * entries
