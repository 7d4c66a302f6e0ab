"""Model FLOPs of a model's forward and backward passes, counted on its modules; matrix products only.

A weight matrix costs two operations (a multiply-add) an entry and token in the forward pass, as much again in
the backward pass where its input needs a gradient, because something below is trained, and once more where it
is trained itself. So what is frozen below all that is trained has a forward pass only, and what is frozen
above passes gradients through. Attention has two products for each query and key, and each of their factors
that needs a gradient costs another one.

The full square of scores counts, for causal and windowed attention too (as PaLM does, arXiv 2204.02311,
appendix B). Left out are DeBERTa's projections of its relative position table, made once a batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import MATRICES, Anatomy, Projection, whole_shape
from dga_scale.backbone.layers import parameter_layers
from dga_scale.backbone.peft.prompt import PROMPT, prompt_length
from dga_scale.unit_kinds import Role

_BELOW_ALL, _ABOVE_ALL = -1, math.inf
"""Depths: below the embeddings, and above the LM head."""
_IN_TURN: tuple[tuple[Role, ...], ...] = (("query", "key", "value"), ("output",), ("up",), ("down",))
"""The roles of a block's projections as they are called; those in one entry read the same states."""


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one pass, by what they are proportional to.

    Attributes:
        token: The FLOPs for each token of the trunk, without those that grow with the row's length.
        pair: The FLOPs for each pair of a token and a key that it attends to.
        label: The FLOPs for each position of the LM head.
        soft_tokens: The number of tokens that the model itself puts before every row.

    """

    token: float
    pair: float
    label: float
    soft_tokens: int

    def trunk(self, rows: int, length: int) -> float:
        """Count the trunk's FLOPs on ``rows`` rows of ``length`` tokens, padding included."""
        tokens = length + self.soft_tokens
        return rows * tokens * (self.token + tokens * self.pair)

    def head(self, labels: int) -> float:
        """Count the LM head's FLOPs on ``labels`` positions."""
        return labels * self.label


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs of a model's passes.

    Attributes:
        forward: Those of a forward pass alone, as a teacher has.
        training: Those of a forward and a backward pass.
        from_embeddings: The same where gradients have to reach the embeddings, whatever is frozen.
        hidden_size: H, for the products that a method makes of hidden states.

    """

    forward: Flops
    training: Flops
    from_embeddings: Flops
    hidden_size: int


def model_flops(model: PreTrainedModel, anatomy: Anatomy) -> ModelFlops:
    """Count a model as it is trained: with what its method added to it, ``requires_grad`` set.

    Reads names, shapes and ``requires_grad`` only, so it works on the meta device and for parameters that
    ZeRO-3 has partitioned.
    """
    counter = _Counter(model, anatomy)
    return ModelFlops(
        forward=counter.flops(_ABOVE_ALL, backward=False),
        training=counter.flops(counter.lowest_trained()),
        from_embeddings=counter.flops(_BELOW_ALL),
        hidden_size=anatomy.hidden_size,
    )


class _Counter:
    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.trunk = anatomy.trunk(model)
        depths = parameter_layers(model, anatomy)
        self.depths = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
        self.blocks: list[list[Projection]] = [[] for _ in range(anatomy.num_layers)]
        for projection in anatomy.projections:
            if projection.module not in anatomy.relative_projections:
                self.blocks[projection.layer].append(projection)

    def lowest_trained(self) -> float:
        """Return the depth of the trunk's lowest parameter that is trained; soft tokens are below all."""
        trained = (
            _BELOW_ALL if PROMPT in name.split(".") else self.depths[id(parameter)]
            for name, parameter in self.trunk.named_parameters()
            if parameter.requires_grad
        )
        return min(trained, default=_ABOVE_ALL)

    def flops(self, lowest: float, *, backward: bool = True) -> Flops:
        """Count the passes of a model whose trunk needs gradients from the depth ``lowest`` upwards."""
        anatomy, width = self.anatomy, self.anatomy.num_heads * self.anatomy.head_dim
        token = pair = 0.0
        for name in anatomy.other_matrices:
            module = self.model.get_submodule(name)
            # Embeddings that are projected lie below, at the same depth.
            token += _in_turn([module], lowest < max(1, self.depths[id(module.weight)]), backward)[0]
        for layer, projections in enumerate(self.blocks):
            reads = lowest < layer + 1
            if anatomy.attention_norms:
                reads = reads or _is_trained(self.model.get_submodule(anatomy.attention_norms[layer]))
            for _ in range(anatomy.layer_uses):
                weights, needing, reads = self._block(projections, reads, backward)
                token += weights
                # Scores are products of queries and keys, or of these and relative positions; outputs of
                # scores and values.
                of_scores = len({"query", "key"} & needing)
                of_outputs = (of_scores > 0) + ("value" in needing)
                token += 2 * width * anatomy.relative_columns * (1 + of_scores * backward)
                pair += 2 * width * (2 + (of_scores + of_outputs) * backward)
        label, reads = _in_turn(
            map(self.model.get_submodule, anatomy.head_modules), lowest < _ABOVE_ALL, backward
        )
        if anatomy.head_takes_embeddings:
            embeddings = self.model.get_input_embeddings()
            label += _products(embeddings.get_parameter("weight"), reads, backward)
        soft_tokens = prompt_length(self.trunk) if hasattr(self.trunk, PROMPT) else 0
        return Flops(token, pair, label, soft_tokens)

    def _block(
        self, projections: Iterable[Projection], reads: bool, backward: bool
    ) -> tuple[float, set[Role], bool]:
        """Count a block's matrices for a token; say which roles' outputs, and if its own, need a gradient."""
        total, needing, first, any_needs = 0.0, set[Role](), reads, reads
        for roles in _IN_TURN:
            if self.anatomy.parallel and roles == ("up",):
                reads = first
            here = [projection for projection in projections if projection.role in roles]
            needs: dict[str, bool] = {}
            for name in dict.fromkeys(projection.module for projection in here):  # once, if it has all roles
                products, needs[name] = _in_turn([self.model.get_submodule(name)], reads, backward)
                total += products
            needing |= {projection.role for projection in here if needs[projection.module]}
            reads = reads or any(needs.values())
            any_needs = any_needs or reads
        return total, needing, any_needs


def _in_turn(modules: Iterable[nn.Module], reads: bool, backward: bool) -> tuple[float, bool]:
    """Count the matrices in modules that are called in turn, as are their parts in their order.

    Args:
        modules: The modules.
        reads: Whether the input of the first needs a gradient.
        backward: Whether there is a backward pass.

    Returns:
        The FLOPs for a token, and whether the last one's output needs a gradient.

    """
    total = 0.0
    for module in modules:
        for part in module.modules():
            matrix = isinstance(part, MATRICES)
            if matrix:
                total += _products(part.get_parameter("weight"), reads, backward)
            if matrix or next(part.children(), None) is None:  # a head may hold its decoder's bias itself
                reads = reads or any(own.requires_grad for own in part.parameters(recurse=False))
    return total, reads


def _products(weight: Tensor, reads: bool, backward: bool) -> float:
    return 2.0 * math.prod(whole_shape(weight)) * (1 + (reads + weight.requires_grad) * backward)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
