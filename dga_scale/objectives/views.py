"""The views of one batch that an objective asks for, in one forward pass of the trunk or in one each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dga_scale.backbone.gates import Gates
from dga_scale.backbone.packed_rows import forward_views
from dga_scale.corpus.loading.batches import Batch


@dataclass(frozen=True)
class View:
    """A view of the batch: a forward pass of the trunk on its masked or clean ids, with or without gates.

    Attributes:
        name: The name by which the objective finds the view's hidden states.
        masked: Whether the ids are the masked ones instead of the clean ones.
        gated: Whether the gates of the units are set to their protection, instead of 1.
        embeddings: Whether the objective needs the trunk's embedding output too.

    """

    name: str
    masked: bool = False
    gated: bool = False
    embeddings: bool = False


class States(NamedTuple):
    """The trunk's output for the views, by name of view."""

    hidden: dict[str, Tensor]  # (B, T, H) last hidden states
    embeddings: dict[str, Tensor]  # (B, T, H) embedding output, of the views that asked for it


def run_views(
    trunk: nn.Module,
    gates: Gates,
    views: Sequence[View],
    inputs: Batch,
    protection: Mapping[str, Tensor],
    *,
    split: bool = False,
) -> States:
    """Compute the states of each view.

    One forward pass holds all views stacked along the batch, so each draws its own dropout. ``split`` makes a
    forward pass for each, with activations of one view at a time; without dropout the numbers are the same.
    Where the inputs are packed, the trunk gets the packed rows, and states are zero at padding.

    Args:
        trunk: The model without its LM head.
        gates: The gates of that model, made for the kinds in ``protection``.
        views: At least one view.
        inputs: The micro-batch of B examples with T tokens.
        protection: ``a`` (layers, units) by kind, on the model's device: the gates of gated views.
        split: Whether each view has a forward pass of its own.

    """
    hidden: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    rows = len(inputs.input_ids if inputs.packed_positions is None else inputs.packed_positions)
    for group in [[view] for view in views] if split else [list(views)]:
        gates.set(_gate_rows(group, rows, protection))
        last, first = forward_views(
            trunk,
            gates.anatomy,
            [inputs.masked_ids if view.masked else inputs.input_ids for view in group],
            inputs.key_mask,
            inputs.packed_positions,
            embeddings=any(view.embeddings for view in group),
        )
        gates.set(None)
        hidden |= {view.name: states for view, states in zip(group, last, strict=True)}
        # Empty where no view of the group asked for it.
        embeddings |= {view.name: e for view, e in zip(group, first, strict=False) if view.embeddings}
    return States(hidden, embeddings)


def _gate_rows(
    group: Sequence[View], rows: int, protection: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return the gates (views * rows, layers, units) by kind; None where no view is gated."""
    if not any(view.gated for view in group):
        return None
    assert protection, "a gated view needs the protection to be set"
    return {
        kind: torch.cat([(a if view.gated else torch.ones_like(a)).expand(rows, -1, -1) for view in group])
        for kind, a in protection.items()
    }


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean of hidden states (B, T, H) over each example's real tokens: (B, H) in fp32."""
    real = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (B, T, 1); a product with 0 or 1 rounds nothing
    tokens = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (hidden * real).sum(dim=1, dtype=torch.float32) / tokens
