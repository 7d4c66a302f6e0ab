"""The readings of one batch that an objective asks for, in one pass of the trunk or in one pass each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dga_scale.backbone.gates import Gates
from dga_scale.backbone.row_groups import joined, row_groups


class ModelInputs(NamedTuple):
    """The tensors of a batch that reach the model, on its device; see ``corpus.batches.Batch``."""

    input_ids: Tensor  # (B, T)
    masked_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    positions: Tensor  # (N,) row * T + token
    labels: Tensor  # (N,), -100 where there is none
    sources: Tensor  # (B,) corpus of each row: 0 the domain's, 1, ... those mixed in
    mixed_rows: Tensor  # (G,) rows of the mixed-in; [0] where there is none
    mixed_slots: Tensor  # (K,) where theirs stand among the N, then -1
    widths: tuple[int, ...] = ()  # of the groups that the rows are read in; see ``backbone.row_groups``

    @property
    def rows(self) -> Tensor:
        """The row of each position: (N,)."""
        return self.positions // self.input_ids.shape[1]


@dataclass(frozen=True)
class View:
    """One reading of the batch.

    Attributes:
        name: by which the objective finds its hidden states.
        masked: reads the masked ids instead of the clean ones.
        gated: the gates of the units are set to their protection, instead of 1.
        embeddings: the objective wants the trunk's embedding output too.

    """

    name: str
    masked: bool = False
    gated: bool = False
    embeddings: bool = False


class States(NamedTuple):
    """What the trunk makes of the views, by name of view."""

    hidden: dict[str, Tensor]  # (B, T, H) last hidden states
    embeddings: dict[str, Tensor]  # (B, T, H) embedding output, of the views that asked for it


def run_views(
    trunk: nn.Module,
    gates: Gates,
    views: Sequence[View],
    inputs: ModelInputs,
    protection: Mapping[str, Tensor],
    *,
    split: bool = False,
) -> States:
    """States of each view.

    One pass holds all views stacked along the batch, so each draws its own dropout. ``split`` makes a pass
    for each, with activations of one view at a time in a pass; without dropout the numbers are the same.
    Where the inputs have widths, each group of rows has passes of its own, and its states are zero behind its
    width.

    Args:
        trunk: the model without its LM head.
        gates: of that model, made for the kinds in ``protection``.
        views: at least one.
        inputs: B examples of T tokens.
        protection: ``a`` (layers, units) by kind, on the model's device: the gates of gated views.
        split: see above.

    """
    groups = [[view] for view in views] if split else [list(views)]
    hidden: dict[str, list[Tensor]] = {view.name: [] for view in views}
    embeddings: dict[str, list[Tensor]] = {view.name: [] for view in views if view.embeddings}
    for group in groups:
        wants = {"output_hidden_states": True} if any(view.embeddings for view in group) else {}
        for rows, width in row_groups(inputs.attention_mask, inputs.widths):
            ids = [(inputs.masked_ids if view.masked else inputs.input_ids)[rows, :width] for view in group]
            size = len(ids[0])
            mask = inputs.attention_mask[rows, :width].repeat(len(group), 1)
            gates.set(_gate_rows(group, size, protection))
            output = trunk(input_ids=torch.cat(ids), attention_mask=mask, **wants)
            gates.set(None)
            for view, of_view in zip(group, output.last_hidden_state.split(size), strict=True):
                hidden[view.name].append(of_view)
            if wants:
                for view, of_view in zip(group, output.hidden_states[0].split(size), strict=True):
                    if view.embeddings:
                        embeddings[view.name].append(of_view)
    tokens = inputs.input_ids.shape[1]
    return States(
        {name: joined(parts, tokens) for name, parts in hidden.items()},
        {name: joined(parts, tokens) for name, parts in embeddings.items()},
    )


def _gate_rows(
    group: Sequence[View], size: int, protection: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Gates (views * B, layers, units) by kind; None where no view is gated."""
    if not any(view.gated for view in group):
        return None
    assert protection, "a gated view needs the protection to be set"
    return {
        kind: torch.cat([(a if view.gated else torch.ones_like(a)).expand(size, -1, -1) for view in group])
        for kind, a in protection.items()
    }


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of hidden states (B, T, H) over the real tokens of each example: (B, H) in fp32."""
    real = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (B, T, 1); a product with 0 or 1 rounds nothing
    tokens = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (hidden * real).sum(dim=1, dtype=torch.float32) / tokens
