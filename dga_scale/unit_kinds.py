"""The kinds of unit that can be measured, gated, masked and protected: one table.

Whatever goes over units (importance, gates, masks, movement, logs, reports, plans) goes over this table. A
new kind is one entry, made here or by ``register_unit_kind``:

>>> from dga_scale.unit_kinds import ProjectionSide, UnitKind, by_channel, register_unit_kind
>>> values = ProjectionSide("value", "output", by_channel)
>>> register_unit_kind(
...     UnitKind(
...         name="value_units",
...         words="value units",
...         shape=lambda sizes: (sizes.num_layers, sizes.width("value")),
...         gate=values,
...         owns=(values,),
...         own_rows="value",
...     )
... )

Nothing is imported that takes time: the command line reads the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from dga_scale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["query", "key", "value", "output", "up", "down"]
"""What a projection does in its block: of attention four, of the FFN two."""
Side = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Channels:
    """What the inputs, or the outputs, of a projection are. CPU tensors, shared between layers."""

    numbers: Tensor
    """(size,) long: number among the channels of the projection's role; -1: another role's, where one module
    holds several. A module that stacks two projections of one role has each number twice."""
    heads: Tensor | None = None
    """(size, k) long: the query heads that use a channel, -1 for none; None: attention has no part in it."""

    @property
    def count(self) -> int:
        """How many channels of the role there are."""
        return int(self.numbers.max()) + 1


class Sizes(Protocol):
    """What kinds read of an ``Anatomy`` to say how many units a model has."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    def width(self, role: Role, side: Side = "output") -> int: ...


@dataclass(frozen=True)
class ProjectionSide:
    """The inputs or the outputs of the projections with one role, and the unit that each belongs to.

    Attributes:
        role: The role of the projections.
        side: Their inputs (columns of the weight matrix), or their outputs (its rows, and the bias).
        units: The units of each channel of that side: (channels, k) long, -1 standing for none.
            ``by_head`` and ``by_channel`` serve most kinds.

    """

    role: Role
    side: Side
    units: Callable[[Channels], Tensor]


def by_head(channels: Channels) -> Tensor:
    """Give each channel the query heads that it serves: several for grouped keys and values."""
    assert channels.heads is not None, "channels that attention heads don't have"
    return channels.heads


def by_channel(channels: Channels) -> Tensor:
    """Give each channel a unit of its own."""
    return channels.numbers.unsqueeze(1)


@dataclass(frozen=True)
class UnitKind:
    """A kind of unit.

    Attributes:
        name: The name in ``--protect``, files and logs.
        words: The words for several of them in sentences.
        shape: The function from a model's sizes (its ``Anatomy``) to (layers, units of a layer).
        owns: The rows and columns of parameters that belong to its units: what a soft-mask lies on.
        own_rows: The role of those rows in ``owns`` that each unit has to itself in every architecture: a
            unit's movement is measured on them.
        gate: The tensor that a unit's gate multiplies: the input or the output of the one projection of a
            layer with that role, each channel of one unit or of none. None: the kind can't be gated, its
            importance has to come from elsewhere, and no general view can be made of it.

    """

    name: str
    words: str
    shape: Callable[[Sizes], tuple[int, int]]
    owns: tuple[ProjectionSide, ...]
    own_rows: Role
    gate: ProjectionSide | None = None


_HEADS = UnitKind(
    name="heads",
    words="attention heads",
    shape=lambda sizes: (sizes.num_layers, sizes.num_heads),
    owns=(
        ProjectionSide("query", "output", by_head),
        ProjectionSide("key", "output", by_head),
        ProjectionSide("value", "output", by_head),
        ProjectionSide("output", "input", by_head),
    ),
    own_rows="query",
    gate=ProjectionSide("output", "input", by_head),
)
_FFN_INTERMEDIATE = UnitKind(
    name="ffn_intermediate",
    words="FFN intermediate units",
    shape=lambda sizes: (sizes.num_layers, sizes.intermediate_size),
    owns=(ProjectionSide("up", "output", by_channel),),
    own_rows="up",
    gate=ProjectionSide("down", "input", by_channel),
)
_FFN_OUTPUT = UnitKind(
    name="ffn_output",
    words="FFN output units",
    shape=lambda sizes: (sizes.num_layers, sizes.hidden_size),
    owns=(ProjectionSide("down", "output", by_channel),),
    own_rows="down",
    gate=ProjectionSide("down", "output", by_channel),
)

UNIT_KINDS: dict[str, UnitKind] = {kind.name: kind for kind in (_HEADS, _FFN_INTERMEDIATE, _FFN_OUTPUT)}
"""By name. Heads are DGA's (arXiv 2301.08986), the FFN's two kinds DAS's (arXiv 2302.03241)."""


def register_unit_kind(kind: UnitKind) -> None:
    """Add a kind to the table; a later one of the same name wins."""
    UNIT_KINDS[kind.name] = kind


def unit_kind(name: str) -> UnitKind:
    """Look a kind up by its name.

    Raises:
        UserError: There is none of that name.

    """
    if name not in UNIT_KINDS:
        raise UserError(f"there is no kind of unit {name!r}: the known ones are {', '.join(UNIT_KINDS)}")
    return UNIT_KINDS[name]


def in_table_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of kinds without repetition, in the order of the table: that of ``--protect`` changes nothing.

    Raises:
        UserError: There is none of a name.

    """
    asked = {unit_kind(name).name for name in names}
    return tuple(name for name in UNIT_KINDS if name in asked)
