"""Virtual gates on unit outputs: no parameters, only there to be set and to be differentiated."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy, Projection
from dga_scale.errors import UserError
from dga_scale.unit_kinds import unit_kind

Rows = dict[str, Tensor]
Args = tuple[Any, ...]


class Gates:
    """Gates that multiply the outputs of units, a row of gates for each example.

    Where a kind's gates sit is said in the table (``unit_kinds``): a head's multiplies its part of the
    attention output projection's input; an FFN intermediate unit's, the down projection's input; an FFN
    output unit's, the down projection's output (DGA's virtual gates, arXiv 2301.08986; the FFN's as in DAS,
    arXiv 2302.03241). With a row an example, one backward pass gives the gate gradients of every example, and
    one forward pass can hold gated and ungated views.

    Args:
        model: The model to put hooks on.
        anatomy: The model's anatomy.
        kinds: The kinds of unit that can be gated.

    Raises:
        UserError: A kind has no gate, here or in any model.

    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[str] = ("heads",)) -> None:
        self.anatomy = anatomy
        self.kinds = tuple(kinds)
        self._rows: Rows = {}
        self._hooks = []
        for kind in kinds:
            gate = unit_kind(kind).gate
            if gate is None:
                raise UserError(f"{unit_kind(kind).words} have no gate to measure their importance by")
            gated = [projection for projection in anatomy.projections if projection.role == gate.role]
            if len({projection.layer for projection in gated}) < len(gated):
                raise UserError(
                    f"{unit_kind(kind).words} can't be gated in {anatomy.architecture} models: a layer has "
                    f"several {gate.role} projections"
                )
            for projection in gated:
                module = model.get_submodule(projection.module)
                units = _UnitOfChannel(
                    gate.units(projection.channels(gate.side)), anatomy.unit_shape(kind)[1]
                )
                gated_units = kind, projection, units
                if gate.side == "input":
                    hook = module.register_forward_pre_hook(partial(self._gate_input, *gated_units))
                else:
                    hook = module.register_forward_hook(partial(self._gate_output, *gated_units))
                self._hooks.append(hook)

    def set(self, rows: Rows | None) -> None:
        """Gate the forward passes from here on.

        Args:
            rows: The gates of each kind to be gated, (batch, layers, units) on the model's device, fp32
                whatever the activations are; gradients flow to them. None, and a kind left out: no gating,
                the activations pass untouched. Gates of one change no bit either.

        Raises:
            ValueError: There are no hooks for a kind, or gates have another number of layers or units.

        """
        for kind, gates in (rows or {}).items():
            if kind not in self.kinds:
                raise ValueError(f"no gates for {kind!r}: this Gates was made for {self.kinds}")
            expected = self.anatomy.unit_shape(kind)
            if gates.dim() != 3 or gates.shape[1:] != expected:
                raise ValueError(
                    f"gates of {kind} must be (batch, {expected[0]}, {expected[1]}), got {tuple(gates.shape)}"
                )
        self._rows = dict(rows or {})

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return ``torch.utils.checkpoint`` contexts in which a recomputation sees its own forward's gates.

        Activation checkpointing runs each block a second time during backward, when the gates may long be
        those of a later forward pass. Pass this as ``context_fn``, with ``use_reentrant=False``.
        """
        return nullcontext(), _Bound(self, self._rows)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gate_input(
        self, kind: str, place: Projection, units: "_UnitOfChannel", module: nn.Module, args: Args
    ) -> Args | None:
        if kind not in self._rows:
            return None
        return (self._gated(kind, place, units, args[0]), *args[1:])

    def _gate_output(
        self,
        kind: str,
        place: Projection,
        units: "_UnitOfChannel",
        module: nn.Module,
        args: Args,
        output: Tensor,
    ) -> Tensor | None:
        if kind not in self._rows:
            return None
        return self._gated(kind, place, units, output)

    def _gated(self, kind: str, place: Projection, units: "_UnitOfChannel", activations: Tensor) -> Tensor:
        gates = self._rows[kind][:, place.layer]  # (batch, units)
        shape = activations.shape
        if place.flat and shape[0] % len(gates) == 0:
            activations = activations.unflatten(0, (len(gates), -1))
        if activations.dim() != 3 or activations.shape[0] != gates.shape[0]:
            raise UserError(
                f"activations of shape {tuple(activations.shape)} can't be matched with the gates of "
                f"{gates.shape[0]} examples; gates need (batch, tokens, width), so use an attention "
                "implementation that keeps the batch axis (attn_implementation sdpa, or flash_attention_2 on "
                "padded batches)"
            )
        return units.multiply(activations, gates.to(activations.dtype)).view(shape)


class _UnitOfChannel:
    """The unit whose gate multiplies each channel of activations.

    Args:
        index: (width, 1), the unit of each channel, -1 for none.
        units: The number of units.

    """

    def __init__(self, index: Tensor, units: int) -> None:
        assert index.shape[1] == 1, "a gate multiplies channels of one unit each"
        self._index = index[:, 0]
        evenly = torch.arange(units, device="cpu").repeat_interleave(len(index) // units)
        self._in_order = torch.equal(self._index, evenly)

    def multiply(self, activations: Tensor, gates: Tensor) -> Tensor:
        """Multiply activations (batch, tokens, channels) by gates (batch, units) of the same dtype."""
        if self._in_order:  # equal shares, one after the other: nothing is gathered
            by_unit = activations.unflatten(-1, (gates.shape[1], -1))  # (batch, tokens, units, share)
            return (by_unit * gates[:, None, :, None]).flatten(-2)
        self._index = self._index.to(gates.device)  # moves once
        by_channel = F.pad(gates, (0, 1), value=1.0)[:, self._index]  # (batch, width); -1 takes the one added
        return activations * by_channel[:, None]


class _Bound:
    """A context that sets the gates inside and back on leaving; it can be entered again."""

    def __init__(self, gates: Gates, rows: Rows) -> None:
        self._gates = gates
        self._rows = rows

    def __enter__(self) -> None:
        self._outside = self._gates._rows
        self._gates._rows = self._rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gates._rows = self._outside
