"""Estimate the memory of activations: what a micro-batch's forward pass keeps for its backward pass.

The formulas follow Korthikanti et al. (arXiv 2205.05198, section 4.1), whose ``s b h (34 + 5 a s / h)`` bytes
a layer lose the second term with fused attention kernels; here by the widths of each architecture.
"""

from dataclasses import dataclass

from dga_scale.corpus.loading.shapes import rounded_up
from dga_scale.planning.models import PlannedModel
from dga_scale.unit_kinds import unit_kind


@dataclass(frozen=True)
class Batch:
    """The shapes of one micro-batch of one rank.

    Attributes:
        rows: The number of rows.
        length: The number of tokens a row.
        labels: The number of positions of a row that the LM head predicts.
        views: The number of views of each row that the trunk computes.
        stacked: The number of views in one forward pass of the trunk: all, or 1 with split_views.
    """

    rows: int
    length: int
    labels: int
    views: int
    stacked: int

    @property
    def tokens(self) -> int:
        """The number of tokens of the micro-batch, each row counted once."""
        return self.rows * self.length

    @property
    def head_positions(self) -> int:
        """The LM head's positions: the labels of all rows, rounded up (``corpus.loading.shapes``)."""
        return int(rounded_up(self.rows * self.labels))


def layer_activations(model: PlannedModel, width: int) -> int:
    """Count the bytes a token that one block keeps for its backward pass.

    h, a, k, f: hidden size, width of the heads, of keys and values, and of the FFN; w bytes an entry::

        attention       w h (its input) + w (a + 2 k) (queries, keys, values) + w a (its output)
                        + 4 bytes a head (log-sum of the softmax; the square of scores is never kept)
                        + w (a + k) where rotated queries and keys stand beside one fused projection, which
                        the values keep alive
        FFN             w h (its input) + 2 w f, or 4 w f where a gate multiplies it
        norms           w h each, two of them; computed in float32 outside a fused kernel 4 h + w h
        dropout         h bytes of mask each, two of them

    With a = k = h, f = 4 h, w = 2 and dropout this is Korthikanti's 34 h, without 5 a s.
    """
    anatomy = model.anatomy
    h, a, f, k = (
        anatomy.hidden_size,
        anatomy.num_heads * anatomy.head_dim,
        anatomy.intermediate_size,
        model.kv_size,
    )
    attention = width * h + width * (2 * a + 2 * k) + 4 * anatomy.num_heads
    if model.fused_rotary:
        attention += width * (a + k)
    ffn = width * h + (4 if model.gated else 2) * width * f
    norms = 2 * ((4 + width) * h if model.fp32_norms else width * h)
    return attention + ffn + norms + (2 * h if model.dropout else 0)


def activations(model: PlannedModel, batch: Batch, width: int, checkpointing: bool) -> int:
    """Count the bytes that the trunk keeps between forward and backward pass of a micro-batch.

    All views wait for the backward pass, in one pass of the trunk or in several: ``split_views`` makes what
    is recomputed and worked on at once smaller, not what is kept. With checkpointing a block keeps its input.
    A pass with a gated view keeps the heads' outputs before and after the gates.
    """
    tokens, h = batch.tokens * batch.views, model.anatomy.hidden_size
    per_block = width * h if checkpointing else layer_activations(model, width) + _gated(model, batch, width)
    # Embeddings keep a norm's input and a dropout mask; the last block leaves the hidden states.
    edges = 3 * width * h + (h if model.dropout else 0)
    return tokens * (edges + model.trained_layers * per_block)


def _gated(model: PlannedModel, batch: Batch, width: int) -> int:
    """Bytes a token and block that gates add, the mean over all views.

    Attention keeps its output for its own backward pass, beside the gated one. What gates elsewhere multiply
    is kept by nobody.
    """
    gates = [unit_kind(kind).gate for kind in model.method.kinds]
    behind_attention = any(
        gate is not None and (gate.role, gate.side) == ("output", "input") for gate in gates
    )
    gated = sum(view.gated for view in model.method.views()) if behind_attention else 0
    share_of_views = (gated > 0) if batch.stacked > 1 else gated / batch.views
    return int(width * share_of_views * model.anatomy.num_heads * model.anatomy.head_dim)


def working_memory(model: PlannedModel, batch: Batch, width: int, checkpointing: bool) -> int:
    """Count the bytes for a block's backward pass: gradients of its activations, and recomputed ones."""
    size = batch.tokens * batch.stacked * layer_activations(model, width)
    return 2 * size if checkpointing else size


def vocabulary(model: PlannedModel, batch: Batch, width: int) -> int:
    """Count the peak bytes of the LM head and the loss, for the masked positions only.

    A position has logits over V tokens and their gradient (w each): fp32 is made for a few at a time
    (``objectives.cross_entropy``). A teacher's are another w + 4, with two log-softmaxes and their divergence
    in fp32 (3 x 4). Before that, the head keeps four states of the hidden size.
    """
    positions = batch.head_positions
    widths = 2 * width
    if model.method.compares_vocabulary:
        widths += 16 + width
    return positions * (model.anatomy.vocab_size * widths + 4 * width * model.anatomy.hidden_size)


def gathered_keys(model: PlannedModel, batch: Batch, ranks: int, micro_steps: int = 1) -> int:
    """Count the bytes of a contrast's fp32 keys of all ranks: received, stacked, their gradient, its sum."""
    return 4 * gather_bytes(model, batch, ranks, micro_steps)


def gather_bytes(model: PlannedModel, batch: Batch, ranks: int, micro_steps: int = 1) -> int:
    """Count the bytes of all ranks' pooled states that one all-gather of a contrast collects."""
    contrast = model.method.contrast()
    if contrast is None or ranks == 1:
        return 0
    rows = batch.rows * (micro_steps if contrast.spans(micro_steps) else 1)
    return contrast.gathered * ranks * rows * model.anatomy.hidden_size * 4


def cached_states(model: PlannedModel, batch: Batch, micro_steps: int) -> int:
    """Count the bytes of a rank's pooled states and gradients where a contrast spans all micro-batches."""
    contrast = model.method.contrast()
    if contrast is None or not contrast.spans(micro_steps):
        return 0
    return 2 * len(contrast.sides) * batch.rows * micro_steps * model.anatomy.hidden_size * 4
