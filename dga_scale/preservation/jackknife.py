"""Standard errors by the jackknife over groups of rows (Efron and Tibshirani, 1993, chapter 11).

What is computed of a mean over rows, however it is computed, is computed again without each of G groups of
the rows. The standard error is the root of (G - 1) / G times the sum of squares of what that changes.
"""

import torch
from torch import Tensor

from dga_scale.preservation.fragments import Reduce

GROUPS = 32
"""The groups G. An error estimated from them is itself sure to 1 / sqrt(2 * 31), an eighth."""


class GroupSums:
    """Sums over the rows of each group, on the device of what is added: nothing waits for a device.

    A row's number alone decides on its group, so that batches and ranks don't matter.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows = torch.zeros(GROUPS)

    def add(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Add values (B, ...) fp32 of the rows with these numbers (B,)."""
        if name not in self._sums:
            self._sums[name] = values.new_zeros(GROUPS, *values.shape[1:])
        self._sums[name].index_add_(0, rows.remainder(GROUPS), values)

    def count(self, rows: Tensor, real: Tensor) -> None:
        """Count the rows with these numbers (B,) that are real (B,) bool."""
        self._rows = self._rows.to(rows.device).index_add(0, rows.remainder(GROUPS), real.float())

    def left_out(self, reduce: Reduce) -> dict[str, Tensor]:
        """Return the means over all rows but those of each group, by name: (groups, ...) fp32 on the CPU.

        Groups without rows are not there, and nothing is where only one has any. Every rank has to call it.
        """
        counts = reduce(self._rows).double().cpu()
        sums = {name: reduce(own).double().cpu() for name, own in self._sums.items()}
        some = counts > 0
        if int(some.sum()) < 2:
            return {}
        rest = counts.sum() - counts[some]  # (groups,)
        return {
            name: ((own.sum(dim=0) - own[some]) / rest.view(-1, *[1] * (own.dim() - 1))).float()
            for name, own in sums.items()
        }


def standard_error(left_out: Tensor) -> Tensor:
    """Return the standard error (...) fp32 of what is (groups, ...) without each of the groups."""
    return (left_out.double().var(dim=0, correction=0) * (len(left_out) - 1)).sqrt().float()
