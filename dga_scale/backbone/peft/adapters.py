"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751) as an extension of any architecture.

Written here because the ``adapters`` package pins transformers to 4.57, and ``peft`` has no such adapters.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.extended import Settings, register_extension

ADAPTER = "adapter"
"""Name of an adapter inside the projection that it follows."""


class Adapter(nn.Module):
    """A residual bottleneck: ``h + up(activation(down(h)))``; the identity until ``up`` is trained.

    Args:
        hidden_size: H.
        size: The width of the bottleneck.
        activation: The activation, as transformers names it.
        dtype: The dtype of the weights.

    """

    def __init__(self, hidden_size: int, size: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size, dtype=dtype)
        self.up = nn.Linear(size, hidden_size, dtype=dtype)
        self.activation = ACT2FN[activation]
        nn.init.normal_(self.down.weight, std=0.01)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., H) to hidden states (..., H)."""
        return hidden + self.up(self.activation(self.down(hidden)))


def apply(base: PreTrainedModel, anatomy: Anatomy, settings: Settings) -> None:
    """Put an adapter behind each attention output projection and each FFN down projection of ``base``.

    They stand before the dropout and the residual connection of their sublayer.

    Args:
        base: The base model, which is changed.
        anatomy: The anatomy of ``base``.
        settings: ``size`` of the bottleneck, ``activation``.

    """
    for name in (*anatomy.attention_outputs, *anatomy.ffn_outputs):
        projection = base.get_submodule(name)
        made = Adapter(anatomy.hidden_size, settings["size"], settings["activation"], base.dtype)
        projection.add_module(ADAPTER, made)
        projection.register_forward_hook(_adapted)


def _adapted(projection: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Take the adapter from the projection, so that a copy of the model calls its own."""
    return projection.get_submodule(ADAPTER)(output)


register_extension("adapter", apply)
