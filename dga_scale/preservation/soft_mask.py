"""The soft-mask: the factor 1 - a on a unit's gradient or on the step that the optimizer makes.

``GradientMask`` is the papers' formula, grad' = (1 - a) grad (DGA, eq. of the soft-mask). Adam divides a
constant factor out again, so it protects little. ``UpdateMask`` scales the movement of the weights instead.
Both work on what is local to a rank, and nothing here communicates before figures are asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.preservation.fragments import (
    Block,
    Fragment,
    Reduce,
    UnitRows,
    UnitSums,
    blocks_of,
    own_rows,
    rectangles_of,
)


@dataclass(frozen=True)
class Factor:
    """The factor 1 - a along one axis of a parameter: ``scale`` (size of the axis,) fp32 on the CPU."""

    dim: int
    scale: Tensor


_CPU_ENTRIES, _GPU_ENTRIES = 1 << 18, 1 << 24
"""The most entries of lines that one operation of ``UpdateMask`` scales, where it has the choice."""

Factors = dict[str, tuple[Factor, ...]]
"""Factors by parameter name; a parameter masked along two axes has two, an unprotected one none."""


def mask_factors(anatomy: Anatomy, protection: Mapping[str, Tensor], kv_protection: str = "min") -> Factors:
    """Compute 1 - a along the axes of the parameters that belong to the protected units.

    A line that belongs to units of several kinds is masked by each: their factors are multiplied.

    Args:
        anatomy: The model's anatomy.
        protection: ``a`` (layers, units) in [0, 1] by kind of unit; other kinds stay unmasked.
        kv_protection: "min", "max" or "mean": the protection of a row that several units share, as the
            key/value heads of a grouped-query model are.

    Raises:
        ValueError: A protection has the wrong shape or leaves [0, 1], or ``kv_protection`` is unknown.

    """
    for kind, a in protection.items():
        expected = anatomy.unit_shape(kind)
        if tuple(a.shape) != expected:
            raise ValueError(
                f"protection of {kind} has shape {tuple(a.shape)}, the model's units are {expected}"
            )
        if not bool(((a >= 0) & (a <= 1)).all()):
            raise ValueError(f"protection of {kind} leaves [0, 1]: 1 - a would amplify or reverse learning")
    # One axis may be described by several slices (a fused QKV projection has three): gather all its units.
    owned: dict[tuple[str, int, str], list[tuple[Tensor, Tensor]]] = {}
    for part in anatomy.slices(protection):
        a = protection[part.kind][part.layer].detach().float().cpu()  # (units,)
        exists = part.unit_index >= 0  # (size, k)
        of_axis = owned.setdefault((part.parameter, part.dim, part.kind), [])
        of_axis.append((a[part.unit_index.clamp(min=0)], exists))
    scales: dict[tuple[str, int], Tensor] = {}
    for (name, dim, _), found in owned.items():
        values = torch.cat([a for a, _ in found], dim=1)  # (size, units that share an index)
        exists = torch.cat([where for _, where in found], dim=1)
        scale = 1 - _combined(values, exists, kv_protection)
        scales[name, dim] = scales[name, dim] * scale if (name, dim) in scales else scale
    factors: Factors = {}
    for (name, dim), scale in scales.items():
        if bool((scale != 1).any()):
            factors[name] = (*factors.get(name, ()), Factor(dim, scale))
    return factors


def _combined(a: Tensor, exists: Tensor, rule: str) -> Tensor:
    """Combine ``a`` (size, k) of the units that share a line: (size,); 0 where a line belongs to none."""
    if rule == "min":
        combined = a.masked_fill(~exists, 1.0).amin(dim=1)
    elif rule == "max":
        combined = a.masked_fill(~exists, 0.0).amax(dim=1)
    elif rule == "mean":
        combined = (a * exists).sum(dim=1) / exists.sum(dim=1).clamp(min=1)
    else:
        raise ValueError(f"kv_protection is min, max or mean, not {rule!r}")
    return combined.masked_fill(~exists.any(dim=1), 0.0)


class GradientMask:
    """A mask that multiplies the gradient of each protected parameter by 1 - a, in hooks on the parameters.

    A constant factor commutes with loss scaling, accumulation, averaging and reduction, so each
    micro-step's gradient is masked where it arises, and whatever comes later (norm, clipping, overflow
    check) sees the mask. The hooks have to stand before DeepSpeed registers its own, hence before the
    importance is known: until ``set`` they pass the gradient on untouched.

    Args:
        named_parameters: The parameters of the Hugging Face model.
        anatomy: The model's anatomy.
        kinds: The kinds of unit that ``set`` may protect.

    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        anatomy: Anatomy,
        kinds: Sequence[str] = ("heads",),
    ) -> None:
        self._factors: Factors = {}
        self._hooked: set[str] = set()
        maskable = {part.parameter for part in anatomy.slices(kinds)}
        for name, parameter in named_parameters:
            if name in maskable:
                parameter.register_hook(lambda gradient, name=name: self.masked(name, gradient))
                self._hooked.add(name)
        assert self._hooked == maskable, f"the model has no parameters {sorted(maskable - self._hooked)}"

    @property
    def factors(self) -> Factors:
        """The factors that gradients are multiplied by."""
        return self._factors

    def set(self, factors: Factors) -> None:
        """Mask with these factors from the next backward pass on."""
        assert factors.keys() <= self._hooked, "factors for kinds of unit that were not announced"
        self._factors = dict(factors)

    def masked(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of a parameter, masked: what the hooks do."""
        factors = self._factors.get(name, ())
        if factors and factors[0].scale.device != gradient.device:  # at the first backward pass
            factors = tuple(Factor(factor.dim, factor.scale.to(gradient.device)) for factor in factors)
            self._factors[name] = factors
        for factor in factors:
            along = [-1 if dim == factor.dim else 1 for dim in range(gradient.dim())]
            # out= forms the product in fp32 and stores it in the gradient's dtype, in one pass.
            gradient = torch.mul(gradient, factor.scale.view(along), out=torch.empty_like(gradient))
        return gradient


@dataclass(frozen=True)
class _MaskedLines:
    """Lines of fragments whose step one operation scales, with the tensors that it needs on their device.

    Attributes:
        parts: The number of the fragment and the block in it, one or several; several have rows of equal
            length for lines, one below the other.
        scale: The factors 1 - a, broadcastable to the lines.
        frozen: Whether 1 - a is 0, broadcastable, or None if nowhere: there the old bits are kept.
        free: Whether 1 - a is 1 inside the lines, or None if nowhere: there the new bits are kept.
        counted: The unit of each line, for each kind of unit that has its own rows here: steps are summed up.

    """

    parts: tuple[tuple[int, Block], ...]
    scale: Tensor
    frozen: Tensor | None
    free: Tensor | None
    counted: tuple[UnitRows, ...] = ()

    def take(self, fragments: Sequence[Fragment]) -> Tensor:
        """Copy the lines out of the fragments' values."""
        if len(self.parts) == 1:
            ((number, block),) = self.parts
            return block.take(fragments[number].values)
        content = fragments[self.parts[0][0]].values.new_empty(len(self.scale), self.parts[0][1].columns)
        for (number, block), into in zip(self.parts, self._split(content), strict=True):
            block.take(fragments[number].values, into)
        return content

    def put(self, fragments: Sequence[Fragment], content: Tensor) -> None:
        """Write the lines back."""
        contents = self._split(content) if len(self.parts) > 1 else (content,)
        for (number, block), part in zip(self.parts, contents, strict=True):
            block.put(fragments[number].values, part)

    def _split(self, content: Tensor) -> tuple[Tensor, ...]:
        return content.split([block.count for _, block in self.parts])


def _stacked(found: Iterable[_MaskedLines]) -> list[_MaskedLines]:
    """Join lines that one operation can scale: a large model has hundreds of blocks.

    An operation shall be worth its launch, but on a CPU stay within the cache, and never take much memory
    beside the copies.
    """
    groups: dict[object, list[list[_MaskedLines]]] = {}
    sizes: dict[object, int] = {}
    for number, lines in enumerate(found):
        ((_, block),) = lines.parts
        rows_only = (
            block.dim == 0 and lines.scale.shape[1] == 1 and all(rows.dim == 0 for rows in lines.counted)
        )
        device = lines.scale.device
        key = (device, block.columns, tuple(rows.kind for rows in lines.counted)) if rows_only else number
        size, most = block.count * block.columns, _CPU_ENTRIES if device.type == "cpu" else _GPU_ENTRIES
        if key not in groups or sizes[key] + size > most:
            groups.setdefault(key, []).append([])
            sizes[key] = 0
        groups[key][-1].append(lines)
        sizes[key] += size
    return [_joined(group) for of_key in groups.values() for group in of_key]


def _joined(group: Sequence[_MaskedLines]) -> _MaskedLines:
    if len(group) == 1:
        return group[0]
    of_kinds = zip(*(lines.counted for lines in group), strict=True)
    return _masked_lines(
        tuple(part for lines in group for part in lines.parts),
        torch.cat([lines.scale for lines in group]),
        tuple(UnitRows(rows[0].kind, 0, torch.cat([each.units for each in rows])) for rows in of_kinds),
    )


def _masked_lines(
    parts: tuple[tuple[int, Block], ...], scale: Tensor, counted: tuple[UnitRows, ...] = ()
) -> _MaskedLines:
    frozen, free = scale == 0, scale == 1
    masks = frozen if bool(frozen.any()) else None, free if bool(free.any()) else None
    return _MaskedLines(parts, scale, *masks, counted)


class UpdateMask:
    """A mask that scales the optimizer's step by 1 - a, weight decay included, on a rank's shard.

    ``before_step`` copies the masked lines, ``after_step`` writes ``before + (1 - a)(after - before)`` back:
    exactly the old bits where a = 1, untouched where a = 0. Only masked lines are copied, into
    transient memory of their size. The proposed and the applied updates of each unit's own rows are summed up
    on the device.
    """

    def __init__(self, anatomy: Anatomy, factors: Factors, kinds: Sequence[str] = ("heads",)) -> None:
        self.factors = factors
        self._kinds = tuple(kinds)
        self._anatomy = anatomy
        self._own_rows = own_rows(anatomy, kinds)
        self._plans: dict[tuple[object, ...], list[_MaskedLines]] = {}
        self._before: list[Tensor] = []
        self._reset_sums()

    def _reset_sums(self) -> None:
        self._proposed = UnitSums(self._anatomy, self._kinds)
        self._applied = UnitSums(self._anatomy, self._kinds)

    @torch.no_grad()
    def before_step(self, fragments: Sequence[Fragment]) -> None:
        """Copy the masked lines of all local fragments, right before the optimizer's step."""
        self._before = [lines.take(fragments) for lines in self._plan(fragments)]

    @torch.no_grad()
    def after_step(self, fragments: Sequence[Fragment]) -> None:
        """Scale the optimizer's update since ``before_step``; the same fragments in the same order."""
        for lines, before in zip(self._plan(fragments), self._before, strict=True):
            after = lines.take(fragments)
            step = after - before
            self._count(self._proposed, lines, step)
            step *= lines.scale
            self._count(self._applied, lines, step)
            step += before
            if lines.frozen is not None:
                step = torch.where(lines.frozen, before, step)
            if lines.free is not None:
                step = torch.where(lines.free, after, step)
            lines.put(fragments, step)
        self._before = []

    def applied_over_proposed(self, reduce: Reduce) -> dict[str, Tensor]:
        """Return the length of the applied over the proposed updates, since the last call.

        Returns:
            (layers, units) by kind, on the CPU: root of the ratio of the sums of squares over steps and
            ranks, on the rows that a unit has to itself. 1 for a unit that is not masked, and
            where no step was proposed. Every rank has to call it.

        """
        ratios = {}
        for kind in self._kinds:
            proposed, applied = self._proposed.total(kind, reduce), self._applied.total(kind, reduce)
            ratios[kind] = torch.where(proposed > 0, applied / proposed, 1.0).sqrt()
        self._reset_sums()
        return ratios

    def _count(self, sums: UnitSums, lines: _MaskedLines, step: Tensor) -> None:
        for rows in lines.counted:
            # A norm makes no copy of the step, as its square would: a quarter of what an update mask takes.
            norms = torch.linalg.vector_norm(step, dim=1 - rows.dim, dtype=torch.float32)
            sums.add(rows.kind, rows.units, norms.square())

    def _plan(self, fragments: Sequence[Fragment]) -> list[_MaskedLines]:
        """Plan the masking of fragments, once for as long as the shards stay where they are.

        A step may come in several calls, one for each of the optimizer's groups.
        """
        keys = tuple(fragment.key for fragment in fragments)
        plan = self._plans.get(keys)
        if plan is None:
            blocks = (each for numbered in enumerate(fragments) for each in self._masked_blocks(*numbered))
            plan = self._plans[keys] = _stacked(blocks)
        return plan

    def _masked_blocks(self, number: int, fragment: Fragment) -> Iterator[_MaskedLines]:
        factors = self.factors.get(fragment.name, ())
        device = fragment.values.device
        if len(factors) == 1:
            (factor,) = factors
            for block in blocks_of(fragment, factor.dim, factor.scale != 1):
                scale = factor.scale[block.span(factor.dim)].to(device)[block.lines]
                yield self._masked_block(number, fragment, block, scale.unsqueeze(1 - factor.dim))
        elif factors:
            for block in rectangles_of(fragment):
                scale = torch.ones(block.rows, block.columns)
                for factor in factors:
                    scale *= factor.scale[block.span(factor.dim)].unsqueeze(1 - factor.dim)
                yield self._masked_block(number, fragment, block, scale.to(device))

    def _masked_block(self, number: int, fragment: Fragment, block: Block, scale: Tensor) -> _MaskedLines:
        counted = []
        for rows in self._own_rows.get(fragment.name, ()):
            units = rows.units[block.span(rows.dim)].to(scale.device)
            if block.lines is not None and block.dim == rows.dim:
                units = units[block.lines]
            counted.append(UnitRows(rows.kind, rows.dim, units))
        return _masked_lines(((number, block),), scale, tuple(counted))
