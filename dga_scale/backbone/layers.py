"""Parameters by depth, for layer-wise learning rates and for freezing the lowest layers."""

from collections.abc import Iterator
from itertools import takewhile

from torch import nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.errors import UserError

EMBEDDINGS = 0
"""Depth of the embeddings; the blocks follow from 1, then the final norm and the LM head."""

_TOP = -1
_ELSEWHERE = {
    # Relative positions, read by all blocks, with their norm; a convolution adds to the first block's output.
    "deberta-v2": {
        "encoder.rel_embeddings.": EMBEDDINGS,
        "encoder.LayerNorm.": EMBEDDINGS,
        "encoder.conv.": 1,
    },
    "mpnet": {"encoder.relative_attention_bias.": EMBEDDINGS},
    "opt": {"final_layer_norm.": _TOP, "project_out.": _TOP},
}
"""Depth of a trunk's modules that are not registered in the order they run, by part of their name."""


def parameter_layers(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, int]:
    """Return the depth of each of ``model.named_parameters()``.

    0 is the embeddings with all that makes them (positions, norm, projection, and a decoder that is tied to
    them), 1 to L the blocks, L + 1 the final norm and the LM head. Reads names and order of modules only, so
    it works for parameters partitioned by ``deepspeed.zero.Init``.
    """
    depths = {id(parameter): depth for parameter, depth in _trunk_depths(model, anatomy)}
    top = anatomy.num_layers + 1
    # By identity: tied embeddings may be named by the decoder (XLM-R's head comes first).
    return {name: depths.get(id(parameter), top) for name, parameter in model.named_parameters()}


def learning_rate_scales(model: PreTrainedModel, anatomy: Anatomy, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate: decay ** (L + 1 - depth).

    The LM head learns at the full rate, each layer below at ``decay`` times that of the one above. Source:
    ELECTRA (arXiv 2003.10555), BEiT (arXiv 2106.08254).
    """
    assert 0 < decay <= 1, decay
    top = anatomy.num_layers + 1
    return {name: decay ** (top - depth) for name, depth in parameter_layers(model, anatomy).items()}


def freeze(model: PreTrainedModel, anatomy: Anatomy, layers: int, embeddings: bool) -> list[str]:
    """Switch the gradients of the lowest ``layers`` blocks off, and of the embeddings if ``embeddings``.

    A decoder tied to the embeddings is frozen with them.

    Returns:
        The names of the frozen parameters.

    Raises:
        UserError: The model has fewer blocks.

    """
    if layers > anatomy.num_layers:
        raise UserError(
            f"--freeze_layers {layers}: the model has {anatomy.num_layers} layers. Freeze that many or fewer."
        )
    frozen = []
    depths = parameter_layers(model, anatomy)
    for name, parameter in model.named_parameters():
        if 1 <= depths[name] <= layers or (embeddings and depths[name] == EMBEDDINGS):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _trunk_depths(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[tuple[nn.Parameter, int]]:
    """Return the depth of each of the trunk's parameters: modules are registered in the order they run."""
    trunk = anatomy.trunk(model)
    block_of = {
        id(parameter): number
        for number, block in enumerate(_blocks(anatomy), 1)
        for parameter in model.get_submodule(block).parameters()
    }
    passed_blocks = False
    for name, parameter in trunk.named_parameters():
        depth = block_of.get(id(parameter))
        passed_blocks = passed_blocks or depth is not None
        if depth is None:
            top = anatomy.num_layers + 1
            elsewhere = _ELSEWHERE.get(anatomy.architecture, {})
            usual = top if passed_blocks else EMBEDDINGS
            depth = next((own for part, own in elsewhere.items() if part in name), usual) % (top + 1)
        yield parameter, depth


def _blocks(anatomy: Anatomy) -> list[str]:
    """Return the module names of the blocks: the common prefix of a block's attention and its FFN."""
    names = []
    for attention, ffn in zip(anatomy.attention_outputs, anatomy.ffn_outputs, strict=True):
        parts = zip(attention.split("."), ffn.split("."), strict=False)
        names.append(".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], parts)))
    return names
