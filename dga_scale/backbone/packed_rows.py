"""Short rows put end to end into rows of full length, so that a trunk computes no padding.

Each packed row holds whole rows of the batch, each with its own positions from the first on; attention is
cut between them, so every state is that of the row read alone (up to rounding).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.cpu_kernels import ATTENTION

_TAKES_ANY_MASK = ("sdpa", "eager", ATTENTION)
"""Attention implementations that take a mask of queries by keys."""


def can_pack(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether the trunk can read packed rows: its architecture and its attention are known to."""
    return anatomy.first_position is not None and model.config._attn_implementation in _TAKES_ANY_MASK


def read_rows(
    trunk: nn.Module,
    anatomy: Anatomy,
    readings: Sequence[Tensor],
    attention_mask: Tensor | None,
    places: Tensor | None = None,
    *,
    embeddings: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Read the same rows with several ids in one pass.

    Args:
        trunk: of the model that ``anatomy`` is of.
        anatomy: see ``can_pack``, where ``places`` are given.
        readings: ids (B, T) each.
        attention_mask: (B, T), 1 = a real token; None: all are. What is packed needs none.
        places: (P, W) what each place of the packed rows reads, as row * T + token, -1 for nothing; None:
            the rows are read as they stand.
        embeddings: give the embedding output too.

    Returns:
        of each reading, last hidden states (B, T, H), and embedding outputs (B, T, H), or (); at padding,
        zeros where rows were packed, else whatever the trunk makes of it.

    """
    wants = {"output_hidden_states": True} if embeddings else {}
    if places is None:
        mask = None if attention_mask is None else attention_mask.repeat(len(readings), 1)
        output = trunk(input_ids=torch.cat([*readings]), attention_mask=mask, **wants)
        first = output.hidden_states[0].chunk(len(readings)) if embeddings else ()
        return output.last_hidden_state.chunk(len(readings)), first
    rows, tokens = readings[0].shape
    read = torch.cat([ids.flatten()[places.clamp(min=0)] for ids in readings])
    first_position = anatomy.first_position
    assert first_position is not None, "the architecture is not known to read packed rows"
    position_ids = places.clamp(min=0).remainder(tokens) + first_position
    output = trunk(
        input_ids=read,
        attention_mask=_masks(trunk, anatomy, places, tokens, len(readings)),
        position_ids=position_ids.repeat(len(readings), 1),
        **wants,
    )
    # Where nothing is read, a state behind all rows, dropped.
    back = torch.where(places < 0, rows * tokens, places).flatten()

    def unpacked(states: Tensor) -> tuple[Tensor, ...]:
        empty = states.new_zeros(rows * tokens + 1, states.shape[-1])
        parts = (part.flatten(0, 1) for part in states.chunk(len(readings)))
        return tuple(empty.index_copy(0, back, part)[:-1].view(rows, tokens, -1) for part in parts)

    return unpacked(output.last_hidden_state), unpacked(output.hidden_states[0]) if embeddings else ()


def last_hidden_states(
    trunk: nn.Module, anatomy: Anatomy, ids: Tensor, mask: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """Last hidden states (B, T, H) of one reading; see ``read_rows``."""
    return read_rows(trunk, anatomy, [ids], mask, places)[0][0]


def _masks(trunk: Any, anatomy: Anatomy, places: Tensor, tokens: int, readings: int) -> Any:
    """Who attends to whom: (readings * P, 1, W, W), by kind of layer where the config has several kinds.

    A place attends to those of its own row, of the past where the model is causal, and within the window of
    layers that have one. What stands nowhere attends to its like: no row of scores is empty.
    """
    config: PretrainedConfig = trunk.config
    row = places.div(tokens, rounding_mode="floor")  # (P, W), -1 where nothing is read
    seen = row[:, None, :, None] == row[:, None, None, :]
    steps = torch.arange(places.shape[1], device=places.device)
    distance = steps[:, None] - steps[None]  # of a query from a key, > 0 for the past
    if anatomy.causal:
        seen = seen & (distance >= 0)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)

    def form(mask: Tensor) -> Tensor:
        if config._attn_implementation == "eager":  # adds it to the scores
            least = torch.finfo(trunk.dtype).min
            mask = torch.zeros(mask.shape, dtype=trunk.dtype, device=mask.device).masked_fill(~mask, least)
        return mask.repeat(readings, 1, 1, 1)

    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return form(seen)
    # Transformers counts the token itself into a causal window, and not into one that looks both ways.
    near = seen & (distance < window if anatomy.causal else distance.abs() <= window)
    if layer_types is None:
        return form(near)
    return {"full_attention": form(seen), "sliding_attention": form(near)}
