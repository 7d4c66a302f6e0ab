"""The model FLOPs of an optimizer step, by which model FLOPs utilisation (MFU) is defined.

As in PaLM (arXiv 2204.02311, appendix B): the operations of the matrix products that the method needs,
whatever its implementation computes besides.

- Every view of a row has a forward and a backward pass, as far down as something is trained;
  ``backbone.flops`` says what frozen parts cost. A teacher has forward passes, on the rows it is asked for.
- The LM head counts at the labels, not at the padding up to a fixed number of positions.
- Rows count with the padding that they have in their batch, packed rows in their place where rows are packed:
  to the trunk they are all of one length. What packing and cutting to the longest save is not counted.
- Recomputing is not counted: neither that of activations (gradient checkpointing) nor the first forward pass
  of a contrast over all micro-batches (GradCache).
- Nor are elementwise work, the optimizer's step, penalties on weights, and rows that are computed without a
  need, so that a rank takes part in a collective.
"""

from typing import Any

from dga_scale.backbone.flops import ModelFlops
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.objectives.contrast import Contrast
from dga_scale.objectives.method import Method


def step_flops(method: Method[Any], model: ModelFlops, step: StepShape) -> float:
    """Count the model FLOPs of a step over all ranks.

    Args:
        method: The method, after its ``prepare``.
        model: The FLOPs of the model that the method has prepared.
        step: The shapes of the global batch.

    """
    views, contrast = len(method.views()), method.contrast()
    rows_of = step.rows_by_length.items()
    total = sum(model.training.trunk(views * rows.taken, length) for length, rows in rows_of)
    total += model.training.head(step.num_labels) + method.term_flops(model, step)
    return total + (contrast_flops(contrast, model.hidden_size, step) if contrast is not None else 0)


def contrast_flops(contrast: Contrast, hidden_size: int, step: StepShape) -> float:
    """Count the products of each example with all keys of its contrast, and their two gradients."""
    keys = step.rows if contrast.spans(step.micro_steps) else step.rows // step.micro_steps
    return 3 * 2.0 * step.rows * contrast.gathered * keys * hidden_size
