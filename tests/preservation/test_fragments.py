"""Cuts of a parameter as rectangles: every entry once, in its place."""

import pytest
import torch

from dga_scale.preservation.fragments import Fragment, blocks_of, rectangles_of


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (7, 1), (6,)])
def test_rectangles_hold_every_entry_in_its_place(shape: tuple[int, ...]) -> None:
    """All cuts [start, end) of a small parameter whose entries are their own indices."""
    flat = torch.arange(torch.Size(shape).numel())
    width = shape[1] if len(shape) == 2 else 1
    for start in range(len(flat)):
        for end in range(start + 1, len(flat) + 1):
            fragment = Fragment("weight", start, shape, flat[start:end])
            blocks = list(rectangles_of(fragment))
            assert len(blocks) <= 3
            seen = []
            for block in blocks:
                content = block.take(fragment.values)
                rows = torch.arange(block.first_row, block.first_row + block.rows)
                columns = torch.arange(block.first_column, block.first_column + block.columns)
                assert torch.equal(content, rows[:, None] * width + columns)
                seen += content.flatten().tolist()
            assert seen == list(range(start, end))


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_take_and_put_the_wanted_lines(dim: int) -> None:
    shape = (5, 7)
    wanted = torch.zeros(shape[dim], dtype=torch.bool)
    wanted[[1, 3, 4]] = True
    for start in range(35):
        for end in range(start + 1, 36):
            flat = torch.arange(35.0)
            fragment = Fragment("weight", start, shape, flat[start:end])
            for block in blocks_of(fragment, dim, wanted):
                block.put(fragment.values, -block.take(fragment.values))
            lines = torch.arange(35) // 7 if dim == 0 else torch.arange(35) % 7
            inside = (torch.arange(35) >= start) & (torch.arange(35) < end)
            expected = torch.where(wanted[lines] & inside, -torch.arange(35.0), torch.arange(35.0))
            assert torch.equal(flat, expected)
