"""The weights that an optimizer steps, and hooks right before and after each of its steps."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from dga_scale.preservation.fragments import Fragment

Hook = Callable[[Sequence[Fragment]], None]
"""Called with what is stepped, as views: writing to a fragment's values changes the weights."""


class SteppedWeights(Protocol):
    """The weights that this rank's optimizer steps: all of a model, or the shard of them that ZeRO left here.

    ``TorchWeights`` are those of a torch optimizer, ``zero.optimizer_hooks.EngineWeights`` those of a
    DeepSpeed engine.
    """

    def fragments(self) -> list[Fragment]:
        """List the fragments that the optimizer steps, named as in the Hugging Face model."""
        ...

    def around_steps(self, before: Hook, after: Hook) -> None:
        """Call ``before`` and ``after`` right around each step from here on, with the stepped fragments."""
        ...


class TorchWeights:
    """The weights that a torch optimizer steps in place.

    Args:
        model: The model, with its parameters named as the units' anatomy names them: the Hugging Face model.
        optimizer: The optimizer: any that steps the model's parameters themselves. A wrapper (of mixed
            precision or of accelerate) is fine as long as it calls this optimizer's ``step``.

    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer

    def fragments(self) -> list[Fragment]:
        """List the parameters, each as one whole fragment."""
        return [
            Fragment(self._names[parameter], 0, tuple(parameter.shape), parameter.data.view(-1))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter in self._names
        ]

    def around_steps(self, before: Hook, after: Hook) -> None:
        """Call ``before`` and ``after`` right around each step of the optimizer."""
        self._optimizer.register_step_pre_hook(lambda *_: before(self.fragments()))
        self._optimizer.register_step_post_hook(lambda *_: after(self.fragments()))
