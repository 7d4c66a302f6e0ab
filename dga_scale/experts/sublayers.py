"""Find the modules of the attention sublayer and the FFN sublayer of a block, for every architecture."""

from collections.abc import Sequence
from typing import Literal

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.errors import UserError

Sublayer = Literal["attention", "ffn"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "ffn")

_NO_EXPERTS: dict[str, tuple[Sublayer, ...]] = {
    "albert": SUBLAYERS,  # all layers have the same: an expert would be each layer's
    "bloom": ("attention",),  # its biases of heads are not one entry an example
    "opt": ("ffn",),  # it is called with all tokens of a batch in one axis
}

_ROLES = {"attention": ("query", "key", "value", "output"), "ffn": ("up", "down")}


def sublayer_modules(anatomy: Anatomy, layer: int, sublayer: Sublayer) -> tuple[str, ...]:
    """Name the children of a block that hold a sublayer's projections, in the order they are called.

    Mostly there is one (``mlp``); BERT's FFN has two, ``intermediate`` and ``output``. Everything else in
    them belongs to the sublayer too: BERT's hold dropout and LayerNorm, Llama's stand between norms.

    Raises:
        UserError: The block has another structure.
    """
    block = block_of(anatomy, layer)
    found: dict[str, None] = {}  # a set that keeps the order
    for projection in anatomy.projections:
        inside = projection.layer == layer and projection.module.startswith(block)
        if inside and projection.role in _ROLES[sublayer]:
            found[block + projection.module.removeprefix(block).split(".")[0]] = None
    if not found:
        raise _unknown(anatomy, layer)
    return tuple(found)


def check_sublayers(anatomy: Anatomy, kinds: Sequence[Sublayer]) -> None:
    """Refuse sublayers that can't have experts.

    Raises:
        UserError: It says which of the architecture's can.
    """
    without = _NO_EXPERTS.get(anatomy.architecture, ())
    if refused := [kind for kind in kinds if kind in without]:
        others = [kind for kind in SUBLAYERS if kind not in without]
        fix = f"Give --cse_experts {others[0]}" if others else "Take another method, or another model"
        words = " and the ".join(refused)
        raise UserError(f"the {words} sublayers of {anatomy.architecture} models can't have experts. {fix}")


def block_of(anatomy: Anatomy, layer: int) -> str:
    """Return the name of a block with a dot at its end: the common prefix of its attention and its FFN.

    Raises:
        UserError: They have no such prefix.
    """
    attention, ffn = (names[layer].split(".") for names in (anatomy.attention_outputs, anatomy.ffn_outputs))
    common = []
    for one, other in zip(attention, ffn, strict=False):
        if one != other:
            break
        common.append(one)
    block = ".".join(common) + "."
    if str(layer) not in common:
        raise _unknown(anatomy, layer)
    return block


def _unknown(anatomy: Anatomy, layer: int) -> UserError:
    one, other = anatomy.attention_outputs[layer], anatomy.ffn_outputs[layer]
    return UserError(
        f"the attention and FFN sublayers of layer {layer} can't be found in this {anatomy.architecture} "
        f"model: {one} and {other} are not two children of one numbered block; experts need a model of an "
        "architecture that the README lists"
    )
