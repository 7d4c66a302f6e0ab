"""Rows of unlike lengths read in several passes of the trunk, each as long as the longest row in it."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def row_groups(attention_mask: Tensor, widths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Rows of each group and the tokens that they are read with.

    Args:
        attention_mask: (B, T).
        widths: one a group of equally many consecutive rows, which have no real token behind it; none: all
            rows are read with T tokens.

    """
    rows, tokens = attention_mask.shape
    size = rows // max(1, len(widths))
    for number, width in enumerate(widths or (tokens,)):
        yield slice(number * size, (number + 1) * size), width


def joined(parts: Sequence[Tensor], tokens: int) -> Tensor:
    """Join states (rows of a group, width, H) of all groups: (B, tokens, H), zeros behind each width."""
    padded = [
        part if part.shape[1] == tokens else F.pad(part, (0, 0, 0, tokens - part.shape[1])) for part in parts
    ]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def last_hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor, widths: Sequence[int]
) -> Tensor:
    """Last hidden states (B, T, H) of rows (B, T); see ``row_groups``."""
    parts = [
        trunk(
            input_ids=input_ids[rows, :width].contiguous(),
            attention_mask=attention_mask[rows, :width].contiguous(),
        ).last_hidden_state
        for rows, width in row_groups(attention_mask, widths)
    ]
    return joined(parts, input_ids.shape[1])
