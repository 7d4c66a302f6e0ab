"""What the inputs and outputs of a block's projections are, from its layout and the config's sizes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dga_scale.backbone.architectures import Layout
from dga_scale.unit_kinds import Channels, Role


@dataclass(frozen=True)
class Sizes:
    """The sizes of a block that its config gives."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int


ProjectionOfABlock = tuple[str, Role, Channels, Channels]
"""Module name inside the block, role, inputs, outputs."""


def projections_of_a_block(layout: Layout, sizes: Sizes) -> list[ProjectionOfABlock]:
    """List the projections of a block in the order they are called; fused ones once for each role."""
    # device="cpu" everywhere: a caller may build its model inside torch.device("meta").
    heads = torch.arange(sizes.heads, device="cpu")
    hidden = _channels(sizes.hidden)
    queries = _channels(sizes.heads * sizes.head_dim, heads.view(-1, 1))
    keys = _channels(sizes.kv_heads * sizes.head_dim, heads.view(sizes.kv_heads, -1))
    intermediate = _channels(sizes.intermediate)
    outputs: dict[Role, Channels] = {"query": queries, "key": keys, "value": keys}
    modules: dict[Role, str] = {"query": layout.query, "key": layout.key, "value": layout.value}
    if layout.qkv:
        outputs = _fused(outputs, layout.qkv_order, sizes.heads)
        modules = dict.fromkeys(modules, layout.qkv)
    found: list[ProjectionOfABlock] = [(modules[role], role, hidden, outputs[role]) for role in modules]
    if layout.relative_query:
        found.append((layout.relative_query, "query", hidden, queries))
    if layout.relative_key:
        found.append((layout.relative_key, "key", hidden, keys))
    found.append((layout.output, "output", queries, hidden))
    # One projection may stack gate and up: rows u and intermediate + u then both make unit u.
    stacked = Channels(intermediate.numbers.repeat(layout.stacked_up))
    found += [(name, "up", hidden, stacked) for name in layout.up]
    found.append((layout.down, "down", intermediate, hidden))
    return found


def _channels(size: int, heads: Tensor | None = None) -> Channels:
    """Number ``size`` channels; ``heads`` (n, k) use equal shares of them, one share after the other."""
    if heads is not None:
        heads = heads.repeat_interleave(size // len(heads), dim=0)
    return Channels(torch.arange(size, device="cpu"), heads)


def _fused(
    outputs: dict[Role, Channels], order: Literal["parts", "heads"], num_heads: int
) -> dict[Role, Channels]:
    """Spread each role's outputs over one projection of queries, keys and values; -1 on others' rows."""
    sizes = [len(channels.numbers) for channels in outputs.values()]
    index = torch.arange(sum(sizes), device="cpu")
    rows = (
        index.split(sizes)
        if order == "parts"
        else index.view(num_heads, 3, -1).transpose(0, 1).flatten(1).unbind()
    )
    fused = {}
    for (role, channels), own in zip(outputs.items(), rows, strict=True):
        assert channels.heads is not None
        numbers = torch.full((len(index),), -1, device="cpu")
        heads = torch.full((len(index), channels.heads.shape[1]), -1, device="cpu")
        numbers[own], heads[own] = channels.numbers, channels.heads
        fused[role] = Channels(numbers, heads)
    return fused
