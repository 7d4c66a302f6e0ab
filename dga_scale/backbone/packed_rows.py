"""Short rows packed into rows of full length, so that a trunk computes no padding.

Each packed row holds whole rows of the batch, each with its own positions from the first on; attention is
cut between them, so every state is that of the row alone (up to rounding).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.cpu_kernels import ATTENTION

_TAKES_ANY_MASK = ("sdpa", "eager", ATTENTION)
"""The attention implementations that take a mask of queries by keys."""


def can_pack(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Return whether the trunk can take packed rows: its architecture and its attention are known to."""
    return anatomy.first_position is not None and model.config._attn_implementation in _TAKES_ANY_MASK


def forward_views(
    trunk: nn.Module,
    anatomy: Anatomy,
    views: Sequence[Tensor],
    attention_mask: Tensor | None,
    positions: Tensor | None = None,
    *,
    embeddings: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute the last hidden states of the same rows with several ids, in one forward pass.

    Args:
        trunk: The trunk of the model that ``anatomy`` describes.
        anatomy: The model's anatomy; see ``can_pack``, where ``positions`` are given.
        views: The views' ids, (B, T) each.
        attention_mask: (B, T), 1 = a real token; None: all are. Packed rows need none.
        positions: (P, W) the position that each token of P packed rows holds, as row * T + token, -1 for
            none; None: the rows are not packed.
        embeddings: Whether the embedding output is returned too.

    Returns:
        For each view, last hidden states (B, T, H), and embedding outputs (B, T, H), or (); at padding,
        zeros where rows were packed, else whatever the trunk makes of it.

    """
    wants = {"output_hidden_states": True} if embeddings else {}
    if positions is None:
        mask = None if attention_mask is None else attention_mask.repeat(len(views), 1)
        output = trunk(input_ids=torch.cat([*views]), attention_mask=mask, **wants)
        first = output.hidden_states[0].chunk(len(views)) if embeddings else ()
        return output.last_hidden_state.chunk(len(views)), first
    rows, tokens = views[0].shape
    packed_ids = torch.cat([ids.flatten()[positions.clamp(min=0)] for ids in views])
    first_position = anatomy.first_position
    assert first_position is not None, "the architecture is not known to take packed rows"
    position_ids = positions.clamp(min=0).remainder(tokens) + first_position
    output = trunk(
        input_ids=packed_ids,
        attention_mask=_masks(trunk, anatomy, positions, tokens, len(views)),
        position_ids=position_ids.repeat(len(views), 1),
        **wants,
    )
    # The states of padding go behind all rows, and are dropped.
    back = torch.where(positions < 0, rows * tokens, positions).flatten()

    def unpacked(states: Tensor) -> tuple[Tensor, ...]:
        empty = states.new_zeros(rows * tokens + 1, states.shape[-1])
        parts = (part.flatten(0, 1) for part in states.chunk(len(views)))
        return tuple(empty.index_copy(0, back, part)[:-1].view(rows, tokens, -1) for part in parts)

    return unpacked(output.last_hidden_state), unpacked(output.hidden_states[0]) if embeddings else ()


def last_hidden_states(
    trunk: nn.Module, anatomy: Anatomy, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None
) -> Tensor:
    """Compute the last hidden states (B, T, H) of one view; see ``forward_views``."""
    return forward_views(trunk, anatomy, [ids], mask, positions)[0][0]


def _masks(trunk: Any, anatomy: Anatomy, positions: Tensor, tokens: int, views: int) -> Any:
    """Return the attention mask (views * P, 1, W, W), by kind of layer where the config has several kinds.

    A token attends to those of its own row, of the past where the model is causal, and within the window of
    layers that have one. Padding attends to padding: no row of scores is empty.
    """
    config: PretrainedConfig = trunk.config
    row = positions.div(tokens, rounding_mode="floor")  # (P, W), -1 at padding
    seen = row[:, None, :, None] == row[:, None, None, :]
    steps = torch.arange(positions.shape[1], device=positions.device)
    distance = steps[:, None] - steps[None]  # of a query from a key, > 0 for the past
    if anatomy.causal:
        seen = seen & (distance >= 0)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)

    def form(mask: Tensor) -> Tensor:
        if config._attn_implementation == "eager":  # adds it to the scores
            least = torch.finfo(trunk.dtype).min
            mask = torch.zeros(mask.shape, dtype=trunk.dtype, device=mask.device).masked_fill(~mask, least)
        return mask.repeat(views, 1, 1, 1)

    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return form(seen)
    # Transformers counts the token itself into a causal window, and not into one that looks both ways.
    near = seen & (distance < window if anatomy.causal else distance.abs() <= window)
    if layer_types is None:
        return form(near)
    return {"full_attention": form(seen), "sliding_attention": form(near)}
