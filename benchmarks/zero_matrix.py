"""How far both soft-masks under every ZeRO stage are from plain PyTorch.

``python -m benchmarks.zero_matrix``: all 672 combinations of mode, stage, offload, precision, accumulation,
clipping, recomputation and 1, 2, 4 ranks, three optimizer steps each, against tests/helpers/reference.py.
With --every each is printed, not only the worst of each group.
"""

from collections import defaultdict

from benchmarks.common import keep_section, options_of, table
from tests.helpers.zero_matrix import (
    Cell,
    Outcome,
    all_cells,
    bf16_noise,
    expected,
    largest_deviation,
    norm_deviation,
    relative_deviation,
    run_on_ranks,
)


def main() -> None:
    """Run all cells, 28 at a time."""
    options = options_of(__doc__, data=False, ranks=[1, 2, 4], every=False)
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


def deviations(cell: Cell, ours: Outcome) -> tuple[float, float, float, float]:
    """Return the deviations of weights, of the movement (relative, and over bf16's own) and of the norm."""
    theirs = expected(cell)
    relative = relative_deviation(ours, theirs)
    noise = relative / bf16_noise(cell) if cell.precision == "bf16" else 0.0
    return largest_deviation(ours, theirs), relative, noise, norm_deviation(ours, theirs)


if __name__ == "__main__":
    main()
