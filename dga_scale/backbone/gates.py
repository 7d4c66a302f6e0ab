"""Virtual gates on unit outputs: no parameters, only there to be set and to be differentiated."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.errors import UserError

Rows = dict[str, Tensor]
Args = tuple[Any, ...]


class Gates:
    """Multiplies the outputs of units by gates, a row of gates for each example.

    A head's gate multiplies its part of the attention output projection's input; an intermediate unit's, the
    down projection's input; a neuron's, the down projection's output (DGA's virtual gates, arXiv 2301.08986;
    the FFN's as in DAS, arXiv 2302.03241). With a row an example, one backward pass gives the gate gradients
    of every example, and one forward pass can hold gated and ungated views.

    Args:
        model: the model to put hooks on.
        anatomy: its anatomy.
        kinds: which kinds of unit can be gated.

    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[str] = ("heads",)) -> None:
        self.anatomy = anatomy
        self.kinds = tuple(kinds)
        self._rows: Rows = {}
        self._hooks = []
        for layer in range(anatomy.num_layers):
            attention_output = model.get_submodule(anatomy.attention_outputs[layer])
            ffn_output = model.get_submodule(anatomy.ffn_outputs[layer])
            if "heads" in kinds:
                hook = partial(self._gate_input, "heads", layer)
                self._hooks.append(attention_output.register_forward_pre_hook(hook))
            if "intermediate" in kinds:
                hook = partial(self._gate_input, "intermediate", layer)
                self._hooks.append(ffn_output.register_forward_pre_hook(hook))
            if "neurons" in kinds:
                self._hooks.append(ffn_output.register_forward_hook(partial(self._gate_output, layer)))

    def set(self, rows: Rows | None) -> None:
        """Gate the forward passes from here on.

        Args:
            rows: for each kind to be gated, gates (batch, layers, units) on the model's device, fp32 whatever
                the activations are; gradients flow to them. None, and a kind left out: no gating, the
                activations pass untouched. Gates of one change no bit either.

        Raises:
            ValueError: a kind this object has no hooks for, or gates of another number of layers or units.

        """
        for kind, gates in (rows or {}).items():
            if kind not in self.kinds:
                raise ValueError(f"no gates for {kind!r}: this Gates was made for {self.kinds}")
            expected = (self.anatomy.num_layers, self.anatomy.units(kind))
            if gates.dim() != 3 or gates.shape[1:] != expected:
                raise ValueError(
                    f"gates of {kind} must be (batch, {expected[0]}, {expected[1]}), got {tuple(gates.shape)}"
                )
        self._rows = dict(rows or {})

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Give ``torch.utils.checkpoint`` contexts in which a recomputation sees its own forward's gates.

        Activation checkpointing runs each block a second time during backward, when the gates may long be
        those of a later forward pass. Pass this as ``context_fn``, with ``use_reentrant=False``.
        """
        return nullcontext(), _Bound(self, self._rows)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gate_input(self, kind: str, layer: int, module: nn.Module, args: Args) -> Args | None:
        if kind not in self._rows:
            return None
        return (self._gated(kind, layer, args[0]), *args[1:])

    def _gate_output(self, layer: int, module: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        if "neurons" not in self._rows:
            return None
        return self._gated("neurons", layer, output)

    def _gated(self, kind: str, layer: int, activations: Tensor) -> Tensor:
        gates = self._rows[kind][:, layer]  # (batch, units)
        if activations.dim() != 3 or activations.shape[0] != gates.shape[0]:
            raise UserError(
                f"activations of shape {tuple(activations.shape)} can't be matched with the gates of "
                f"{gates.shape[0]} examples; gates need (batch, tokens, width), so use an attention "
                "implementation that keeps the batch axis (attn_implementation sdpa, or flash_attention_2 on "
                "padded batches)"
            )
        by_unit = activations.unflatten(-1, (gates.shape[1], -1))  # (batch, tokens, units, width of a unit)
        return (by_unit * gates.to(activations.dtype)[:, None, :, None]).flatten(-2)


class _Bound:
    """Sets the gates inside, and back on leaving; can be entered again, as two backward passes do."""

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
