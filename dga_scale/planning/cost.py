"""Estimate the traffic and time of an optimizer step.

Volumes follow the ZeRO paper (arXiv 1910.02054, section 7): of a collective on S bytes over N ranks, a rank
sends ``S (N - 1) / N``; an all-reduce is two of those. With P parameters data parallelism moves 2 P, stages 1
and 2 the same where gradients are reduce-scattered, stage 3 half as much again: 3 P. What DeepSpeed 0.19 does
differs in two points, both counted here. ZeRO-1 and 2 all-reduce gradients, though each rank keeps its part
only (``use_multi_rank_bucket_allreduce``): 3 P. And gradients travel in ``communication_data_type``, which is
fp32 unless the JSON says otherwise. Stages 2 and 3 reduce, and stage 3 gathers, in every micro-batch.

A collective takes its bytes over the bandwidth plus a latency for every hop (the alpha-beta model; Thakur,
Rabenseifner and Gropp 2005). Hops as NCCL counts them to choose how to send (``src/graph/tuning.cc``): a
ring's all-gather and reduce-scatter go from rank to rank, N - 1 hops, its all-reduce twice as many; a tree's
all-reduce goes up and down through the ranks of a machine and log2 of the machines. The fastest way counts.

Compute is a roofline (Williams et al. 2009): matrix products at the peak, everything else at the memory's
bandwidth, one after the other, as eager PyTorch runs them.

A contrast over all ranks gathers ``sides * N * rows * hidden`` fp32 figures in each micro-batch, or those of
all at once, and scatters their gradients back: the only term that grows with the number of ranks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dga_scale.corpus.loading.batches import RowCounts, StepShape
from dga_scale.objectives.flops import step_flops
from dga_scale.planning.activations import Batch, gather_bytes
from dga_scale.planning.gpus import Gpu
from dga_scale.planning.memory import Zero, share
from dga_scale.planning.models import PlannedModel


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends (and receives) in an optimizer step.

    Attributes:
        gradients: The bytes of gradients that are reduced over the ranks.
        updated_weights: The bytes of weights that ZeRO-1 and 2 gather after the step.
        gathered_weights: The bytes of weights that ZeRO-3 gathers for forward and backward passes.
        contrast: The bytes of pooled states and their gradients.
        host: The bytes to and from the host's memory in offload.
        reductions: The number of calls that reduce gradients.
        updates: The number of calls that gather updated weights.
        gathers: The number of calls that gather weights for forward and backward passes.
        contrasts: The number of calls that gather keys or scatter their gradients.
    """

    gradients: float
    updated_weights: float
    gathered_weights: float
    contrast: float
    host: float
    reductions: int
    updates: int
    gathers: int
    contrasts: int

    @property
    def total(self) -> float:
        """The bytes that are sent between ranks."""
        return self.gradients + self.updated_weights + self.gathered_weights + self.contrast


def traffic(model: PlannedModel, zero: Zero, batch: Batch, *, micro_steps: int) -> Traffic:
    """Count the bytes that a rank sends in a step of ``micro_steps`` micro-batches.

    ZeRO-3 gathers the weights for the forward passes (see ``trunk_forwards``), for the backward pass, and for
    a teacher's forward pass. Recomputed blocks find them gathered for the backward pass.
    """
    sent_share = (zero.ranks - 1) / zero.ranks
    trained, width = model.trained_parameters, zero.weight_bytes
    reductions = micro_steps if zero.stage >= 2 else 1
    all_reduced = zero.stage == 0 or (zero.stage < 3 and zero.all_reduce)
    gradients = trained * zero.communication_bytes * (2 if all_reduced else 1) * reductions
    updated = trained * width if zero.stage in (1, 2) else 0
    large = [size for size in model.sizes.values() if size > zero.persistence]
    sharded = sum(large)
    gathers = micro_steps * (trunk_forwards(model, batch, micro_steps) + 1 + model.method.needs_teacher)
    gathered = gathers * sharded * width if zero.stage == 3 else 0
    contrast = model.method.contrast()
    keys = gather_bytes(model, batch, zero.ranks, micro_steps)
    contrasts = 1 if contrast is not None and contrast.spans(micro_steps) else micro_steps
    own = share(model, zero)
    host: float = own * (zero.communication_bytes + width) if zero.offload_optimizer else 0
    if zero.offload_parameters:
        host += gathers * sharded * width / zero.ranks
    return Traffic(
        gradients=gradients * sent_share,
        updated_weights=updated * sent_share,
        gathered_weights=gathered * sent_share,
        contrast=2 * contrasts * keys * sent_share,
        host=host,
        reductions=reductions * math.ceil(trained / max(1, zero.reduce_bucket)),
        updates=int(zero.stage in (1, 2)),
        gathers=gathers * len(large) if zero.stage == 3 else 0,  # each large parameter is a call of its own
        contrasts=2 * contrasts * (keys > 0),
    )


def trunk_forwards(model: PlannedModel, batch: Batch, micro_steps: int) -> int:
    """Count the trunk's forward passes for a micro-batch: one, or with split views one for each view.

    A contrast over all micro-batches computes its views twice, apart from the others.
    """
    contrast, own = model.method.contrast(), batch.views // batch.stacked
    if contrast is None or not contrast.spans(micro_steps):
        return own
    contrasted = len(contrast.sides)
    return own + contrasted if batch.stacked == 1 else 2 + (contrasted < batch.views)


@dataclass(frozen=True)
class Time:
    """The seconds of an optimizer step; ``step`` is their sum.

    Attributes:
        compute: The time of forward and backward passes, with recomputation and a teacher's forward passes.
        optimizer: The time of AdamW on this rank's entries, on the GPU or the host.
        communication: The time of all communication between ranks if none overlapped with computation.
        contrast: The time in ``communication`` that a contrast takes.
        host: The time of transfers between GPU and host.
        exposed: The time in ``communication`` that does not overlap with computation.
    """

    compute: float
    optimizer: float
    communication: float
    contrast: float
    host: float
    exposed: float

    @property
    def step(self) -> float:
        """The wall time of the step."""
        return self.compute + self.optimizer + self.host + self.exposed

    @property
    def communication_share(self) -> float:
        """The share of the wall time that is spent waiting for communication."""
        return self.exposed / self.step


class StepFlops(NamedTuple):
    """The FLOPs of a step over all ranks.

    Attributes:
        model: The model FLOPs, by which MFU is defined (``objectives.flops``).
        computed: The FLOPs that are computed. They are more by what is recomputed (the forward pass of the
            trunk; where a contrast goes over all micro-batches, that of its views) and by padding of the LM
            head's positions, the teacher's too.
        views: Those of the views' passes, of the LM head and of the contrast, nothing recomputed.

    """

    model: float
    computed: float
    views: float


def forward_backward_flops(
    model: PlannedModel, batch: Batch, *, micro_steps: int, ranks: int, checkpointing: bool
) -> StepFlops:
    """Count the FLOPs of a step's forward and backward passes over all ranks."""
    rows, labels = batch.rows * micro_steps * ranks, batch.rows * batch.labels * micro_steps * ranks
    mixed, mixed_labels = round(rows * model.mixed), round(labels * model.mixed)
    rows_by_length = {batch.length: RowCounts(rows, rows, mixed)}
    step = StepShape(rows_by_length, (labels - mixed_labels, mixed_labels), micro_steps)
    forward, training = model.flops.forward, model.flops.training
    counted = step_flops(model.method, model.flops, step)
    padding = batch.head_positions * micro_steps * ranks - labels
    views = counted + training.head(padding) - model.method.term_flops(model.flops, step)
    computed = counted + training.head(padding)
    if model.method.compares_vocabulary:
        computed += forward.head(padding)
    if checkpointing:
        computed += forward.trunk(batch.views * rows, batch.length)
    contrast = model.method.contrast()
    if contrast is not None and contrast.spans(micro_steps):
        computed += forward.trunk(len(contrast.sides) * rows, batch.length)
    return StepFlops(counted, computed, views)


def moved_bytes(model: PlannedModel, zero: Zero, batch: Batch, *, micro_steps: int, computed: float) -> float:
    """Count the bytes that a rank's kernels other than matrix products read and write in a step.

    h, f and w as in ``memory.layer_activations``; per token and block, a kernel reads and writes its entries
    once, and its backward kernel reads gradient and input and writes a gradient::

        activation         5 f (10 f with a gate and its product)
        residual sums      6 h forward, 6 h backward, two of them together
        norms              4 h forward, 6 h backward, two of them together; in float32 four times the bytes
        dropout            8 h, and its masks' bytes, 4 h, two of them together
        attention          3 times queries, keys, values and output

    A prediction takes 4 w + 36 bytes for each token of the vocabulary: logits; float32 and log-softmax;
    float32 and softmax again, weighted and rounded.
    A trained weight's gradient is written, and copied into a bucket and what it travels in.
    ``computed`` is the ratio of computed FLOPs to those of the views, since recomputed activations are moved
    again, and a teacher's are moved too.
    """
    anatomy, w = model.anatomy, zero.weight_bytes
    h, f = anatomy.hidden_size, anatomy.intermediate_size
    entries = (10 if model.gated else 5) * f + 12 * h + 10 * h * (4 if model.fp32_norms else 1)
    entries += 3 * 2 * (anatomy.num_heads * anatomy.head_dim + model.kv_size)
    a_token = entries * w + (8 * w + 4) * h * model.dropout
    blocks = batch.tokens * batch.views * anatomy.num_layers * anatomy.layer_uses * a_token
    head = batch.head_positions * anatomy.vocab_size * (4 * w + 36)
    travels = 2 * (w + zero.communication_bytes) * (zero.communication_bytes != w and zero.ranks > 1)
    gradients = model.trained_parameters * (w + (2 * w + travels if zero.stage else 0))
    return micro_steps * ((blocks + head) * computed + gradients)


def bus_bandwidth(gpu: Gpu, ranks: int, ranks_per_node: int) -> float:
    """Return the bytes a second that each rank's links carry in a ring over all ranks.

    Between machines the rings of a node share its network cards: ``ranks_per_node`` of them. Inside one it is
    NVLink's; the slower of the two counts (the bus bandwidth of NCCL's performance tests).
    """
    link = gpu.intra_node_gbs
    if ranks > ranks_per_node:
        link = min(link, gpu.inter_node_gbs * ranks_per_node)
    return link * 1e9 * gpu.link_efficiency


@dataclass(frozen=True)
class Protocol:
    """A protocol of NCCL: its share of the bandwidth, the seconds of a hop in a machine and between two."""

    bandwidth: float
    inside: float
    between: float


RINGS = (Protocol(0.25, 0.85e-6, 2.7e-6), Protocol(0.92, 1.9e-6, 4.0e-6), Protocol(1.0, 3.4e-6, 9.6e-6))
TREES = (Protocol(0.24, 0.94e-6, 5.0e-6), Protocol(0.82, 1.2e-6, 8.5e-6))
"""The protocols LL, LL128 and (rings) Simple over NVLink and InfiniBand: NCCL's ``src/graph/tuning.cc``."""


def collective(
    sent: float, calls: int, gpu: Gpu, ranks: int, ranks_per_node: int, *, all_reduce: bool = False
) -> float:
    """Estimate the seconds of ``calls`` collectives in which a rank sends ``sent`` bytes in total.

    The collectives are all-gathers or reduce-scatters, or all-reduces with ``all_reduce``.
    """
    if ranks == 1 or not calls:
        return 0.0
    nodes = math.ceil(ranks / ranks_per_node)
    seconds = sent / bus_bandwidth(gpu, ranks, ranks_per_node)
    rings = [(w, (ranks - nodes) * w.inside + (nodes - 1) * w.between) for w in RINGS]
    if not all_reduce:
        return min(seconds / protocol.bandwidth + calls * hops for protocol, hops in rings)
    up = [(w, (min(ranks, ranks_per_node) - 1) * w.inside + math.log2(nodes) * w.between) for w in TREES]
    return min(seconds / protocol.bandwidth + calls * 2 * hops for protocol, hops in (*rings, *up))


def time(
    model: PlannedModel,
    zero: Zero,
    batch: Batch,
    gpu: Gpu,
    *,
    micro_steps: int,
    ranks_per_node: int,
    checkpointing: bool,
) -> Time:
    """Estimate a step's seconds.

    Forward and backward passes are a roofline (see above), or run at ``gpu.mfu`` where that was measured.
    AdamW reads 16 and writes 12 bytes an entry, and the weights of the passes; before it, gradients are
    brought to fp32, their norm is taken, and they are scaled: 20 bytes more. The reduction of gradients,
    except a last bucket, hides behind the backward pass with ``overlap_comm``; ZeRO-3's gathers behind both
    passes, as it prefetches; at most ``overlap`` of a pass. What follows the step, and the contrast's keys,
    which the loss waits for, do not hide.
    """
    _, flops, views = forward_backward_flops(
        model, batch, micro_steps=micro_steps, ranks=zero.ranks, checkpointing=checkpointing
    )
    peak = (gpu.fp32_tflops if zero.weight_bytes == 4 else gpu.bf16_tflops) * 1e12
    bandwidth = gpu.memory_gbs * 1e9 * gpu.memory_efficiency
    if gpu.mfu:
        compute = flops / zero.ranks / (peak * gpu.mfu)
    else:
        moved_here = moved_bytes(model, zero, batch, micro_steps=micro_steps, computed=flops / views)
        compute = flops / zero.ranks / (peak * gpu.product_efficiency) + moved_here / bandwidth
    entries = share(model, zero) * (48 + zero.weight_bytes)
    if zero.offload_optimizer:
        bandwidth = gpu.host_memory_gbs * 1e9
    moved, links = traffic(model, zero, batch, micro_steps=micro_steps), (gpu, zero.ranks, ranks_per_node)
    all_reduced = zero.stage == 0 or (zero.stage < 3 and zero.all_reduce)
    gradients = collective(moved.gradients, moved.reductions, *links, all_reduce=all_reduced)
    weights = collective(moved.gathered_weights, moved.gathers, *links)
    updated = collective(moved.updated_weights, moved.updates, *links)
    contrast = collective(moved.contrast, moved.contrasts, *links)
    # Gradients hide behind the backward pass of the micro-batches that reduce; stage 0 waits for the last.
    reducing = compute * 2 / 3 if zero.stage >= 2 else compute * 2 / 3 / micro_steps
    behind_backward = gpu.overlap * reducing if zero.overlap and zero.stage else 0.0
    hidden = min(gradients, behind_backward)
    if zero.stage == 3:
        hidden += min(weights, gpu.overlap * compute - hidden)
    communication = gradients + weights + updated + contrast
    return Time(
        compute=compute,
        optimizer=entries / bandwidth,
        communication=communication,
        contrast=contrast,
        host=moved.host / (gpu.host_link_gbs * 1e9),
        exposed=communication - hidden,
    )
