"""The fragments of a rank's shard of the weights, and the units that they belong to.

ZeRO cuts parameters anywhere: a rank may own the end of one row and the start of another. A ``Fragment`` is
such a cut; ``blocks_of`` finds in it the rows (or columns) of a parameter that someone asks for, as matrix
views, so that what is done with them is a handful of vectorised operations whatever the cut.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.unit_kinds import unit_kind

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks and returns the sum."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter's entries that this rank's optimizer steps.

    Attributes:
        name: The parameter, as in the Hugging Face model's ``named_parameters()``.
        start: The index of the first entry in the flattened full parameter.
        shape: The shape of the full parameter.
        values: (n,) view of the weights that the optimizer writes (the fp32 masters), n >= 1.

    """

    name: str
    start: int
    shape: tuple[int, ...]
    values: Tensor

    @property
    def key(self) -> tuple[str, int, int, torch.device]:
        """The part of a fragment that stays the same from step to step."""
        return self.name, self.start, self.values.numel(), self.values.device


@dataclass(frozen=True)
class Block:
    """A rectangle of a parameter inside a fragment, and the lines of it (rows or columns) that are meant.

    Parameters are taken as matrices: a vector of n entries is n rows of one column.

    Attributes:
        offset, rows, columns: The place of the rectangle in ``Fragment.values``.
        first_row, first_column: The place of the rectangle in the parameter.
        dim: 0, the lines are rows; 1, columns.
        lines: (n,) indices along ``dim`` within the rectangle; None = all.

    """

    offset: int
    rows: int
    columns: int
    first_row: int
    first_column: int
    dim: int = 0
    lines: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of lines."""
        return (self.rows, self.columns)[self.dim] if self.lines is None else len(self.lines)

    def span(self, dim: int) -> slice:
        """Return the stretch of the parameter's axis ``dim`` that the rectangle covers."""
        first, size = (self.first_row, self.rows) if dim == 0 else (self.first_column, self.columns)
        return slice(first, first + size)

    def take(self, values: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy the lines out of a fragment's values, into a new tensor or a contiguous one."""
        matrix = self._matrix(values)
        if self.lines is None:
            return matrix.clone() if into is None else into.copy_(matrix)
        return torch.index_select(matrix, self.dim, self.lines, out=into)

    def put(self, values: Tensor, content: Tensor) -> None:
        """Write the lines back."""
        matrix = self._matrix(values)
        if self.lines is None:
            matrix.copy_(content)
        else:
            matrix.index_copy_(self.dim, self.lines, content)

    def _matrix(self, values: Tensor) -> Tensor:
        return values[self.offset : self.offset + self.rows * self.columns].view(self.rows, self.columns)


def rectangles_of(fragment: Fragment) -> Iterator[Block]:
    """Cut a fragment into at most three rectangles: the end of a row, whole rows, the start of a row."""
    assert len(fragment.shape) <= 2, f"{fragment.name} is no matrix or vector: {fragment.shape}"
    width = fragment.shape[1] if len(fragment.shape) == 2 else 1
    position, end = fragment.start, fragment.start + fragment.values.numel()
    while position < end:
        row, column = divmod(position, width)
        if column == 0 and end - position >= width:
            rows, columns = (end - position) // width, width
        else:
            rows, columns = 1, min(width - column, end - position)
        yield Block(position - fragment.start, rows, columns, row, column)
        position += rows * columns


def blocks_of(fragment: Fragment, dim: int, selected: Tensor) -> Iterator[Block]:
    """Find the selected lines of a fragment.

    Args:
        fragment: The fragment, on any device; the index tensors are made there.
        dim: The axis of the parameter along which the lines are counted.
        selected: (size of that axis,) bool, on the CPU.

    """
    for block in rectangles_of(fragment):
        lines = selected[block.span(dim)].nonzero().flatten()
        if len(lines) > 0:
            yield Block(
                block.offset,
                block.rows,
                block.columns,
                block.first_row,
                block.first_column,
                dim,
                lines.to(fragment.values.device),
            )


@dataclass(frozen=True)
class UnitRows:
    """The unit that each line of a parameter, or of a part of it, belongs to.

    Attributes:
        kind: The kind of unit.
        dim: The axis of the parameter that counts the lines.
        units: (lines,) layer * units + unit, or -1 for none. Of whole parameters on the CPU.

    """

    kind: str
    dim: int
    units: Tensor


def own_rows(anatomy: Anatomy, kinds: Sequence[str]) -> dict[str, tuple[UnitRows, ...]]:
    """Find the rows that units have to themselves: a unit's movement is measured there.

    Returns:
        The masks by parameter, an entry for each kind of unit that has rows in it.

    """
    found: dict[str, tuple[UnitRows, ...]] = {}
    for part in anatomy.slices(kinds):
        if part.role == unit_kind(part.kind).own_rows:
            assert part.unit_index.shape[1] == 1, (
                f"rows of {part.parameter} are shared by several {part.kind}"
            )
            unit = part.unit_index[:, 0]
            units = torch.where(unit >= 0, part.layer * anatomy.unit_shape(part.kind)[1] + unit, -1)
            rows = UnitRows(part.kind, part.dim, units)
            found[part.parameter] = (*found.get(part.parameter, ()), rows)
    return found


class UnitSums:
    """Running sums by layer and unit, kept on the device of what is added: nothing waits for a device."""

    def __init__(self, anatomy: Anatomy, kinds: Sequence[str]) -> None:
        self._shapes = {kind: anatomy.unit_shape(kind) for kind in kinds}
        self._sums: dict[tuple[str, torch.device], Tensor] = {}

    def add(self, kind: str, units: Tensor, values: Tensor) -> None:
        """Add ``values`` (n,) to the units (n,) numbered layer * units + unit; -1 is dropped."""
        layers, size = self._shapes[kind]
        # One entry more than there are units: index -1 lands there.
        sums = self._sums.get((kind, values.device))
        if sums is None:
            sums = self._sums[kind, values.device] = values.new_zeros(layers * size + 1, dtype=torch.float32)
        sums.index_add_(0, units.remainder(layers * size + 1), values.float())

    def total(self, kind: str, reduce: Reduce) -> Tensor:
        """Return the sums over ranks (layers, units), on the CPU. Communicates; every rank has to call it."""
        layers, size = self._shapes[kind]
        local = torch.zeros(layers * size)
        for (of_kind, _), sums in self._sums.items():
            if of_kind == kind:
                local += sums[:-1].cpu()
        return reduce(local).view(layers, size)
