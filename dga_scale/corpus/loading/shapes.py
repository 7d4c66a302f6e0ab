"""Shapes of batches: as little padding as a few fixed sizes allow.

Rows packed by document (reviews, say) are mostly far shorter than the longest. The rows that all ranks read
in one pass are sorted by length and dealt out, so that ranks have like work; a rank's rows are then put end
to end into as few rows of the longest's length as hold them. Lengths and numbers of labels are rounded up:
kernels are chosen, and memory is laid out, for each new shape.
"""

import bisect
from collections.abc import Sequence

import numpy as np

MULTIPLE = 32
"""Lengths and numbers of labels are rounded up to a multiple of it: less makes more shapes, more pads."""

MOST_HEIGHTS = 16
"""A micro-batch has at most as many numbers of packed rows; of large ones the number is rounded up."""


def rounded_up(counts: np.ndarray | int) -> np.ndarray:
    """The next multiples of ``MULTIPLE``, at least one."""
    return np.maximum(1, -(-np.asarray(counts) // MULTIPLE)) * MULTIPLE


def width_of(lengths: np.ndarray, longest: int) -> int:
    """Tokens that rows of some lengths are padded to: the longest's, rounded up, at most ``longest``."""
    return min(int(rounded_up(int(lengths.max()))), longest)


def packed(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put rows into packed rows of ``width`` tokens: the numbers of the rows in each, in their order.

    Best fit: a row goes where it leaves least room, or opens a new packed row. For rows with the longest
    first that takes at most 11/9 of the fewest possible (Johnson et al., SIAM J. Comput. 3, 1974).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, packed row), rising
    for number, length in enumerate(lengths):
        at = bisect.bisect_left(room, (length, 0))
        left, into = room.pop(at) if at < len(room) else (width, len(bins))
        if into == len(bins):
            bins.append([])
        bins[into].append(number)
        bisect.insort(room, (left - length, into))
    return bins


def height_of(packed_rows: int, rows: int) -> int:
    """Packed rows of a micro-batch of ``rows`` with those that only fill up: few numbers of them occur."""
    unit = -(-rows // MOST_HEIGHTS)
    return -(-packed_rows // unit) * unit


def places_of(lengths: Sequence[int], width: int) -> np.ndarray:
    """What each place of the packed rows reads: (``height_of``, width) int64, row * width + token, or -1."""
    bins = packed(lengths, width)
    places = np.full((height_of(len(bins), len(lengths)), width), -1, dtype=np.int64)
    for into, rows in zip(places, bins, strict=False):
        start = 0
        for row in rows:
            into[start : start + lengths[row]] = row * width + np.arange(lengths[row])
            start += lengths[row]
    return places


def dealt_out(lengths: np.ndarray, packing: str, ranks: int) -> np.ndarray:
    """Which of the rows of one pass of all ranks each rank reads, in its order: (ranks, rows of one).

    Chunks go to the ranks in consecutive parts. Documents are sorted, the longest first and rows of one
    length in their order, and dealt out one by one, so that all ranks get like lengths.
    """
    if packing == "chunk":
        return np.arange(len(lengths)).reshape(ranks, -1)
    return np.argsort(-lengths.astype(np.int64), kind="stable").reshape(-1, ranks).T
