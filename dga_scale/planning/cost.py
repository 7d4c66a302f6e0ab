"""Traffic and time of an optimizer step.

Volumes follow the ZeRO paper (arXiv 1910.02054, section 7): of a collective on S bytes over N ranks, a rank
sends ``S (N - 1) / N``; an all-reduce is two of those. With P parameters data parallelism moves 2 P, stages 1
and 2 the same where gradients are reduce-scattered, stage 3 half as much again: 3 P. What DeepSpeed 0.19 does
differs in two points, both counted here. ZeRO-1 and 2 all-reduce gradients, though each rank keeps its part
only (``use_multi_rank_bucket_allreduce``): 3 P. And gradients travel in ``communication_data_type``, which is
fp32 unless the JSON says otherwise. Stages 2 and 3 reduce after every pass, stage 3 gathers in every pass.

A contrast over all ranks gathers ``sides * N * rows * hidden`` fp32 figures in each pass, or those of all
passes at once, and scatters their gradients back: the only part that grows with the number of ranks.
"""

import math
from dataclasses import dataclass

from dga_scale.monitoring.throughput import step_flops
from dga_scale.planning.gpus import Gpu
from dga_scale.planning.memory import Batch, Zero, gather_bytes, share
from dga_scale.planning.models import PlannedModel


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends (and receives) in an optimizer step.

    Attributes:
        gradients: reduced over the ranks.
        updated_weights: gathered after the step in ZeRO-1 and 2.
        gathered_weights: in the passes of ZeRO-3.
        contrast: pooled states and their gradients.
        host: to and from the host's memory in offload.
        collectives: number of calls, for their latency.

    """

    gradients: float
    updated_weights: float
    gathered_weights: float
    contrast: float
    host: float
    collectives: int

    @property
    def total(self) -> float:
        """Between ranks."""
        return self.gradients + self.updated_weights + self.gathered_weights + self.contrast


def traffic(model: PlannedModel, zero: Zero, batch: Batch, *, passes: int) -> Traffic:
    """Count what a rank sends in a step of ``passes`` micro-batches.

    ZeRO-3 gathers the weights for the forward passes (see ``trunk_passes``), for the backward pass, and for a
    teacher's forward pass. What is recomputed finds them gathered for the backward pass.
    """
    part = (zero.ranks - 1) / zero.ranks
    trained, width = model.trained_parameters, zero.weight_bytes
    reductions = passes if zero.stage >= 2 else 1
    all_reduced = zero.stage == 0 or (zero.stage < 3 and zero.all_reduce)
    gradients = trained * zero.communication_bytes * (2 if all_reduced else 1) * reductions
    updated = trained * width if zero.stage in (1, 2) else 0
    sharded = sum(size for size in model.sizes.values() if size > zero.persistence)
    gathers = passes * (trunk_passes(model, batch, passes) + 1)
    gathered = gathers * sharded * width if zero.stage == 3 else 0
    if zero.stage == 3 and model.method.needs_teacher:
        gathered += passes * sharded * width
    contrast = model.method.contrast()
    keys = gather_bytes(model, batch, zero.ranks, passes)
    contrasts = 1 if contrast is not None and contrast.spans(passes) else passes
    calls = reductions * math.ceil(trained / max(1, zero.reduce_bucket)) + 2 * contrasts * (keys > 0)
    if zero.stage in (1, 2):
        calls += 1
    elif zero.stage == 3:
        calls += gathers * (model.anatomy.num_layers + 2)
    own = share(model, zero)
    host: float = own * (zero.communication_bytes + width) if zero.offload_optimizer else 0
    if zero.offload_parameters:
        host += gathers * sharded * width / zero.ranks
    return Traffic(
        gradients=gradients * part,
        updated_weights=updated * part,
        gathered_weights=gathered * part,
        contrast=2 * contrasts * keys * part,
        host=host,
        collectives=calls if zero.ranks > 1 else 0,
    )


def trunk_passes(model: PlannedModel, batch: Batch, passes: int) -> int:
    """Forward passes of the trunk for a micro-batch: one, or with split views one for each.

    A contrast over all passes reads what it contrasts twice, apart from what else there is to read.
    """
    contrast, own = model.method.contrast(), batch.views // batch.stacked
    if contrast is None or not contrast.spans(passes):
        return own
    contrasted = len(contrast.sides)
    return own + contrasted if batch.stacked == 1 else 2 + (contrasted < batch.views)


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, as ``step`` adds them up.

    Attributes:
        passes: forward and backward, with what is recomputed and a teacher's passes.
        optimizer: AdamW on this rank's entries, where they lie.
        communication: between ranks, were nothing hidden; of it ``contrast`` for the contrast.
        host: between GPU and host.
        exposed: of communication, what does not hide behind the passes.

    """

    passes: float
    optimizer: float
    communication: float
    contrast: float
    host: float
    exposed: float

    @property
    def step(self) -> float:
        """Wall time."""
        return self.passes + self.optimizer + self.host + self.exposed

    @property
    def communication_share(self) -> float:
        """Of the wall time that is waited for communication."""
        return self.exposed / self.step


def forward_backward_flops(
    model: PlannedModel, batch: Batch, *, passes: int, ranks: int, checkpointing: bool
) -> tuple[float, float]:
    """Model FLOPs of a step over all ranks (which MFU counts), and FLOPs that are computed.

    Recomputed blocks add a forward pass; a teacher a forward pass of one reading; a contrast over all passes
    one of the readings contrasted. A model whose lower part is frozen is counted as if it were not.
    """
    rows = batch.rows * passes * ranks
    counted = step_flops(
        model.anatomy,
        views=batch.views,
        rows=rows,
        sequence_length=batch.length,
        head_tokens=rows * batch.labels,
    )
    computed = counted
    if checkpointing:
        tokens = batch.views * rows * batch.length
        computed += model.anatomy.forward_flops(tokens, batch.length, 0)
    contrast = model.method.contrast()
    if contrast is not None and contrast.spans(passes):
        tokens = len(contrast.sides) * rows * batch.length
        computed += model.anatomy.forward_flops(tokens, batch.length, 0)
    if model.method.needs_teacher:
        computed += model.anatomy.forward_flops(rows * batch.length, batch.length, rows * batch.labels)
    return counted, computed


def bus_bandwidth(gpu: Gpu, ranks: int, ranks_per_node: int) -> float:
    """Bytes a second that each rank's links carry in a ring over all ranks.

    Between machines the rings of a node share its network cards: ``ranks_per_node`` of them. Inside one it is
    NVLink's; the slower of the two counts (the bus bandwidth of NCCL's performance tests).
    """
    link = gpu.intra_node_gbs
    if ranks > ranks_per_node:
        link = min(link, gpu.inter_node_gbs * ranks_per_node)
    return link * 1e9 * gpu.link_efficiency


def time(
    model: PlannedModel,
    zero: Zero,
    batch: Batch,
    gpu: Gpu,
    *,
    passes: int,
    ranks_per_node: int,
    checkpointing: bool,
) -> Time:
    """Estimate a step's seconds.

    Matrix products run at ``mfu`` of the GPU's peak (the bytes of all other kernels are in that figure).
    AdamW reads 16 and writes 12 bytes an entry, and the weights of the passes. The reduction of gradients,
    except a last bucket, hides behind the backward pass with ``overlap_comm``; ZeRO-3's gathers behind both
    passes, as it prefetches; at most ``overlap`` of a pass. What follows the step, and the contrast's keys,
    which the loss waits for, do not hide.
    """
    _, flops = forward_backward_flops(
        model, batch, passes=passes, ranks=zero.ranks, checkpointing=checkpointing
    )
    peak = gpu.fp32_tflops if zero.weight_bytes == 4 else gpu.bf16_tflops
    compute = flops / zero.ranks / (peak * 1e12 * gpu.mfu)
    entries = share(model, zero) * (28 + zero.weight_bytes)
    memory_gbs = gpu.host_memory_gbs if zero.offload_optimizer else gpu.memory_gbs
    moved = traffic(model, zero, batch, passes=passes)
    bandwidth = bus_bandwidth(gpu, zero.ranks, ranks_per_node)
    latency = moved.collectives * gpu.latency_us * 1e-6 * math.log2(max(2, zero.ranks))
    # Gradients hide behind the backward pass of the passes that reduce; stage 0 starts after the last one.
    reducing = compute * 2 / 3 if zero.stage >= 2 else compute * 2 / 3 / passes
    behind_backward = gpu.overlap * reducing if zero.overlap and zero.stage else 0.0
    hidden = min(moved.gradients / bandwidth, behind_backward)
    if zero.stage == 3:
        left = gpu.overlap * compute - hidden
        hidden += min(moved.gathered_weights / bandwidth, left)
    communication = moved.total / bandwidth + latency
    return Time(
        passes=compute,
        optimizer=entries / (memory_gbs * 1e9),
        communication=communication,
        contrast=moved.contrast / bandwidth,
        host=moved.host / (gpu.host_link_gbs * 1e9),
        exposed=communication - hidden,
    )
