"""Shapes of batches: as little padding as a few fixed sizes allow.

Rows packed by document (reviews, say) are mostly far shorter than the longest. The rows that all ranks read
in one pass are sorted by length and dealt out, so that ranks have like work; a rank's rows are cut into
groups, each a pass of the trunk of its own, as long as its longest row. Lengths and numbers of labels are
rounded up: kernels are chosen, and memory is laid out, for each new shape.
"""

import numpy as np

MULTIPLE = 32
"""Lengths and numbers of labels are rounded up to a multiple of it: less makes more shapes, more pads."""

MOST_GROUPS = 4
"""Row groups of a rank's micro-batch: more would leave less padding, in passes of fewer rows."""


def rounded_up(counts: np.ndarray | int) -> np.ndarray:
    """The next multiples of ``MULTIPLE``, at least one."""
    return np.maximum(1, -(-np.asarray(counts) // MULTIPLE)) * MULTIPLE


def row_groups(packing: str, micro_batch_size: int) -> int:
    """Groups that a micro-batch's rows are cut into, the same for a whole run and on all ranks.

    Under ZeRO-3, whose gathers are collective, every rank has to call the trunk as often. Rows packed in
    chunks are equally long: one group.
    """
    if packing == "chunk":
        return 1
    return max(groups for groups in range(1, MOST_GROUPS + 1) if micro_batch_size % groups == 0)


def widths_of(lengths: np.ndarray, groups: int, longest: int) -> np.ndarray:
    """Tokens that each group of rows is padded to: its longest row's, rounded up, at most ``longest``.

    Args:
        lengths: (..., B) of the rows in their order.
        groups: consecutive groups of equally many rows.
        longest: the corpus's ``sequence_length``.

    Returns:
        (..., groups)

    """
    by_group = lengths.reshape(*lengths.shape[:-1], groups, -1).max(axis=-1)
    return np.minimum(rounded_up(by_group), longest)


def dealt_out(lengths: np.ndarray, packing: str, ranks: int) -> np.ndarray:
    """Which of the rows of one pass of all ranks each rank reads, in its order: (ranks, rows of one).

    Chunks go to the ranks in consecutive parts. Documents are sorted, the longest first and rows of one
    length in their order, and dealt out one by one, so that all ranks get like lengths.
    """
    if packing == "chunk":
        return np.arange(len(lengths)).reshape(ranks, -1)
    return np.argsort(-lengths.astype(np.int64), kind="stable").reshape(-1, ranks).T
