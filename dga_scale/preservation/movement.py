"""Effective protection: each unit's movement since the start, beside its target 1 - a.

This figure shows whether a soft-mask does anything: Adam undoes a mask on the gradient (docs/methods.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.preservation.fragments import (
    Block,
    Fragment,
    Reduce,
    UnitRows,
    UnitSums,
    blocks_of,
    own_rows,
)

PROTECTED_ABOVE = 0.5
"""The protection ``a`` above which a unit counts as protected in a run's figures."""


@dataclass(frozen=True)
class EffectiveProtection:
    """The effective protection of one kind of unit. All (layers, units), on the CPU.

    Attributes:
        target: The factor 1 - a of the mask.
        movement: The root mean square distance of the entries of the unit's own rows from their start.
        relative: The movement over the mean movement of the unprotected units of its layer (the least
            protected where all are protected); 0 as long as those have not moved. A mask that works has it
            near ``target``.

    """

    target: Tensor
    movement: Tensor
    relative: Tensor

    def figures(self) -> dict[str, float]:
        """Return the protected units' number, mean target (``a``) and measured protection (1 - ``relative``).

        Protected are the units with more than ``PROTECTED_ABOVE``; without any the figures are empty.
        """
        protected = 1 - self.target > PROTECTED_ABOVE
        if not bool(protected.any()):
            return {}
        return {
            "protected_units": int(protected.sum()),
            "target_protection": 1 - self.target[protected].mean().item(),
            "measured_protection": 1 - self.relative[protected].mean().item(),
        }


class MovementTracker:
    """A tracker of the units' own rows (heads: their query rows) since the start, on the rank that owns them.

    Args:
        anatomy: The model's units.
        fragments: The local fragments, holding the weights that count as the start: the pretrained ones, so
            build it before a checkpoint is loaded.
        kinds: The kinds of unit.

    """

    def __init__(
        self, anatomy: Anatomy, fragments: Sequence[Fragment], kinds: Sequence[str] = ("heads",)
    ) -> None:
        self._anatomy = anatomy
        self._kinds = tuple(kinds)
        self._own_rows = own_rows(anatomy, kinds)
        self._start: dict[tuple[str, int, int, torch.device], list[tuple[UnitRows, Block, Tensor]]] = {}
        for fragment in fragments:
            self._start[fragment.key] = [
                (rows, block, block.take(fragment.values.detach()))
                for rows in self._own_rows.get(fragment.name, ())
                for block in blocks_of(fragment, rows.dim, rows.units >= 0)
            ]

    @torch.no_grad()
    def movement(self, fragments: Sequence[Fragment], reduce: Reduce) -> dict[str, Tensor]:
        """Return the root mean square distance of units' own rows from the start, (layers, units) by kind.

        Over the entries of all ranks, each of which has to call it, with fragments that lie as at the start.
        A mean, so that it is the same where ranks hold disjoint shards and where each holds all (ZeRO-0).
        """
        sums, entries = UnitSums(self._anatomy, self._kinds), UnitSums(self._anatomy, self._kinds)
        for fragment in fragments:
            for rows, block, start in self._start[fragment.key]:
                squares = (block.take(fragment.values) - start).float().square()
                units = rows.units[block.span(rows.dim)].to(squares.device)[block.lines]
                sums.add(rows.kind, units, squares.sum(dim=1 - rows.dim))
                entries.add(rows.kind, units, torch.ones_like(squares).sum(dim=1 - rows.dim))
        return {kind: (sums.total(kind, reduce) / entries.total(kind, reduce)).sqrt() for kind in self._kinds}

    def effective_protection(
        self, fragments: Sequence[Fragment], protection: Mapping[str, Tensor], reduce: Reduce
    ) -> dict[str, EffectiveProtection]:
        """Return each unit's movement beside its protection ``a`` (layers, units), by kind."""
        return {
            kind: compare(moved, protection[kind].float().cpu())
            for kind, moved in self.movement(fragments, reduce).items()
        }


def compare(movement: Tensor, protection: Tensor) -> EffectiveProtection:
    """Set movement (layers, units) in relation to that of each layer's least protected units."""
    least = protection <= protection.amin(dim=1, keepdim=True)
    reference = (movement * least).sum(dim=1, keepdim=True) / least.sum(dim=1, keepdim=True)
    relative = torch.where(reference > 0, movement / reference, 0.0)
    return EffectiveProtection(1 - protection, movement, relative)
