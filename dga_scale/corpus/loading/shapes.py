"""Shapes of batches: as little padding as a few fixed sizes allow.

Rows of a corpus of whole documents (reviews, say) are mostly far shorter than the longest. The rows of one
micro-step of all ranks are sorted by length and assigned to the ranks in turn, so that these have like work;
a rank's rows are then packed into as few rows of the longest's length as hold them. Lengths and numbers of
labels are rounded up: kernels are chosen, and memory is laid out, for each new shape.
"""

import bisect
from collections.abc import Sequence

import numpy as np

MULTIPLE = 32
"""The multiple that lengths and numbers of labels are rounded up to: less makes more shapes, more pads."""

MAX_PACKED_SIZES = 16
"""The most numbers of packed rows that occur for one micro-batch size: a number is rounded up to these."""


def rounded_up(counts: np.ndarray | int) -> np.ndarray:
    """Return the next multiples of ``MULTIPLE``, at least one."""
    return np.maximum(1, -(-np.asarray(counts) // MULTIPLE)) * MULTIPLE


def padded_length(lengths: np.ndarray, longest: int) -> int:
    """Return the length that rows are padded to: the longest's, rounded up, at most ``longest``."""
    return min(int(rounded_up(int(lengths.max()))), longest)


def pack_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Pack rows into packed rows of ``length`` tokens, by best fit.

    Returns the numbers of the rows in each packed row, in their order. A row goes where it leaves least room,
    or opens a new packed row. For rows with the longest first this takes at most 11/9 of the fewest possible
    (Johnson et al., SIAM J. Comput. 3, 1974).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, packed row), rising
    for number, tokens in enumerate(lengths):
        at = bisect.bisect_left(room, (tokens, 0))
        left, into = room.pop(at) if at < len(room) else (length, len(bins))
        if into == len(bins):
            bins.append([])
        bins[into].append(number)
        bisect.insort(room, (left - tokens, into))
    return bins


def num_packed_rows(packed_rows: int, rows: int) -> int:
    """Return the number of packed rows of a micro-batch of ``rows``, padding rows included: few occur."""
    unit = -(-rows // MAX_PACKED_SIZES)
    return -(-packed_rows // unit) * unit


def pack_positions(lengths: Sequence[int], length: int) -> np.ndarray:
    """Return the position that each token of packed rows holds, or -1: (packed rows, length) int64."""
    bins = pack_rows(lengths, length)
    positions = np.full((num_packed_rows(len(bins), len(lengths)), length), -1, dtype=np.int64)
    for into, rows in zip(positions, bins, strict=False):
        start = 0
        for row in rows:
            into[start : start + lengths[row]] = row * length + np.arange(lengths[row])
            start += lengths[row]
    return positions


def assigned_rows(lengths: np.ndarray, packing: str, ranks: int) -> np.ndarray:
    """Assign the rows of one micro-step to the ranks: (ranks, micro-batch) row numbers, in a rank's order.

    Chunks go to the ranks in consecutive parts. Documents are sorted, the longest first and rows of one
    length in their order, and assigned to the ranks in turn, so that all get like lengths.
    """
    if packing == "chunk":
        return np.arange(len(lengths)).reshape(ranks, -1)
    return np.argsort(-lengths.astype(np.int64), kind="stable").reshape(-1, ranks).T
