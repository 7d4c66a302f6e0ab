"""How far both soft-masks under every ZeRO stage are from plain PyTorch.

``python -m benchmarks.zero_matrix``: all 672 combinations of mode, stage, offload, precision, accumulation,
clipping, recomputation and 1, 2, 4 ranks, three optimizer steps each, against tests/helpers/reference.py.
With --every each is printed, not only the worst of each group.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.common import keep_section, options_of, table

if TYPE_CHECKING:
    from tests.helpers.zero_matrix import Cell, Outcome


def main() -> None:
    """Run all cells, 28 at a time."""
    options = options_of(__doc__, data=False, ranks=[1, 2, 4], every=False)
    from tests.helpers.zero_matrix import all_cells, run_on_ranks  # --help does not wait for torch

    groups: dict[tuple[str, int, bool, str, int], list[tuple[float, ...]]] = defaultdict(list)
    cells = all_cells(options.ranks)
    for first in range(0, len(cells), 28):
        for cell, ours in run_on_ranks(cells[first : first + 28]).items():
            figures = deviations(cell, ours)
            groups[cell.mode, cell.stage, cell.offload, cell.precision, cell.world_size].append(figures)
            if options.every:
                print(cell, " ".join(f"{figure:.1e}" for figure in figures), flush=True)
    rows = [["mask", "ZeRO", "offload", "precision", "ranks", "cells", "weight", "movement", "of bf16's own"]]
    rows[0].append("norm")
    for key, found in sorted(groups.items()):
        largest = [f"{max(column):.1e}" for column in zip(*found, strict=True)]
        rows.append([*map(str, key), str(len(found)), *largest])
    keep_section("ZeRO against plain PyTorch", table(rows))


def deviations(cell: "Cell", ours: "Outcome") -> tuple[float, float, float, float]:
    """Return the deviations of weights, of the movement (relative, and over bf16's own) and of the norm."""
    from tests.helpers import zero_matrix as matrix

    theirs = matrix.expected(cell)
    relative = matrix.relative_deviation(ours, theirs)
    noise = relative / matrix.bf16_noise(cell) if cell.precision == "bf16" else 0.0
    weight, norm = matrix.largest_deviation(ours, theirs), matrix.norm_deviation(ours, theirs)
    return weight, relative, noise, norm


if __name__ == "__main__":
    main()
