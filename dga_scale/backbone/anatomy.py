"""The anatomy of a language model: its heads, FFN units and LM head, found from its module names."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dga_scale.backbone.architectures import LAYOUTS, Layout, first_position, layout_of
from dga_scale.backbone.block_channels import Sizes, projections_of_a_block
from dga_scale.errors import UserError
from dga_scale.unit_kinds import Channels, Role, Side, unit_kind

MATRICES = (nn.Linear, Conv1D, nn.Conv1d)
"""The modules that multiply what they are given by a weight matrix."""
NO_LIMIT = 2**31 - 1
"""``Anatomy.max_positions`` of a model that takes texts of any length."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of a block, or one role's share of a module that holds several (a fused QKV)."""

    module: str
    """Name in the model; ``weight`` and, where there is one, ``bias`` are its parameters."""
    role: Role
    layer: int
    inputs: Channels
    outputs: Channels
    transposed: bool
    """The weight is stored as (inputs, outputs): GPT-2's Conv1D."""
    bias: bool
    flat: bool = False
    """It is called with (batch * tokens, channels): OPT's FFN."""

    def channels(self, side: Side) -> Channels:
        """Return the channels of one side."""
        return self.inputs if side == "input" else self.outputs

    def axis(self, side: Side) -> int:
        """Return the axis of the weight matrix that counts the channels of a side."""
        return int((side == "input") != self.transposed)


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """The entries of one parameter that belong to the units of a layer.

    Index ``i`` along ``dim`` of ``parameter`` belongs to the units ``unit_index[i]``; -1 stands for none. An
    index of keys or values that query heads share belongs to several. ``unit_index`` is a CPU long tensor
    (size along dim, k).
    """

    parameter: str
    """Name as in ``model.named_parameters()``."""
    role: Role
    kind: str
    layer: int
    dim: int
    unit_index: Tensor


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The sizes and the modules of a model's units. Plain data: it holds no reference to the model."""

    architecture: str
    """The config's ``model_type``."""
    num_layers: int
    """Blocks with weights of their own; ALBERT calls each of them ``layer_uses`` times."""
    num_heads: int
    """Query heads a layer; grouped key/value heads are fewer, and each belongs to several of these."""
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    causal: bool
    max_positions: int
    """Longest sequence, in tokens, that the model has positions for."""
    first_position: int | None
    """Position id of a row's first token, where several rows can be read in one (``packed_rows``)."""
    projections: tuple[Projection, ...]
    """Of all blocks, layer by layer, in the order they are called."""
    lm_head_parameters: tuple[str, ...]
    """Parameters that only the LM head has; a decoder tied to the embeddings is not among them."""
    head_modules: tuple[str, ...]
    head_takes_embeddings: bool
    relative_projections: tuple[str, ...]
    """Modules among the projections that project a table of relative positions, not tokens (DeBERTa)."""
    other_matrices: tuple[str, ...]
    """Modules of the trunk beside the projections whose weight matrices every token is multiplied by."""
    attention_norms: tuple[str, ...]
    """For each layer, the norm that stands in front of its attention; empty where norms stand behind."""
    parallel: bool
    """Attention and FFN of a block read the same states."""
    relative_columns: int
    """Columns of attention scores against relative positions, per token and layer (DeBERTa)."""
    layer_uses: int = 1
    """How often a forward pass calls each layer."""
    logit_softcap: float | None = None
    """The bound c of logits that are taken as c tanh(logits / c): Gemma 2."""

    @property
    def attention_outputs(self) -> tuple[str, ...]:
        """For each layer, the name of attention's output projection; its input is (..., heads * head_dim)."""
        return self._modules("output")

    @property
    def ffn_outputs(self) -> tuple[str, ...]:
        """For each layer, the name of the down projection, (..., intermediate_size) to (..., hidden_size)."""
        return self._modules("down")

    def _modules(self, role: Role) -> tuple[str, ...]:
        return tuple(projection.module for projection in self.projections if projection.role == role)

    def width(self, role: Role, side: Side = "output") -> int:
        """Return the number of channels of a role's projection: ``width("key")`` counts a layer's keys."""
        return next(p.channels(side).count for p in self.projections if p.role == role)

    def unit_shape(self, kind: str) -> tuple[int, int]:
        """Return (layers, units of a layer) of a kind: the shape of its importance, protection and gates.

        Raises:
            UserError: There is no such kind.

        """
        return unit_kind(kind).shape(self)

    def in_words(self, kinds: Iterable[str]) -> str:
        """Say how many units of some kinds there are: ``"12 x 12 heads, 12 x 3072 ffn_intermediate"``."""
        shapes = {kind: self.unit_shape(kind) for kind in kinds}
        return ", ".join(f"{layers} x {units} {kind}" for kind, (layers, units) in shapes.items())

    def slices(self, kinds: Iterable[str]) -> Iterator[ParameterSlice]:
        """Find the entries of parameters that belong to units of some kinds, layer by layer.

        Raises:
            UserError: There is no such kind.

        """
        owned = [(kind, side) for kind in kinds for side in unit_kind(kind).owns]
        for projection in self.projections:
            for kind, side in owned:
                if side.role != projection.role:
                    continue
                units = side.units(projection.channels(side.side))
                slice_of = projection.role, kind, projection.layer
                dim = projection.axis(side.side)
                yield ParameterSlice(f"{projection.module}.weight", *slice_of, dim, units)
                if side.side == "output" and projection.bias:
                    yield ParameterSlice(f"{projection.module}.bias", *slice_of, 0, units)

    def trunk(self, model: PreTrainedModel) -> nn.Module:
        """Return the model without its LM head.

        Called with ``input_ids`` and ``attention_mask`` (batch, tokens); gives ``.last_hidden_state``
        (batch, tokens, hidden_size).
        """
        return trunk_of(model)

    def lm_logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Compute logits (..., vocab_size) of last hidden states (..., hidden_size) with the model's LM head.

        The modules are called, not copied, so that hooks on them (ZeRO-3 gathers parameters in such) run.
        """
        *first, last = (model.get_submodule(name) for name in self.head_modules)
        for module in first:
            hidden = module(hidden)
        if self.head_takes_embeddings:
            return last(hidden, model.get_input_embeddings())
        logits: Tensor = last(hidden)
        if self.logit_softcap is not None:  # in transformers' order: the bits are the model's
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """Return the module of a model, with whatever head, that makes its last hidden states.

    OPT's is the decoder inside the base model, which the causal LM calls past it.
    """
    base: Any = model.base_model
    return cast(nn.Module, base.decoder if model.config.model_type == "opt" else base)


_registered: dict[str, Callable[[PreTrainedModel], Anatomy]] = {}


def register(model_type: str, describe_model: Callable[[PreTrainedModel], Anatomy]) -> None:
    """Teach ``anatomy_of`` an architecture, by the ``model_type`` of its config.

    Most need only the names of their modules; ``print(model)`` shows them:

    >>> from dga_scale.backbone.anatomy import describe, register
    >>> from dga_scale.backbone.architectures import Layout
    >>> starcoder2 = Layout(
    ...     block="model.layers.{}",
    ...     query="self_attn.q_proj",
    ...     key="self_attn.k_proj",
    ...     value="self_attn.v_proj",
    ...     output="self_attn.o_proj",
    ...     up=("mlp.c_fc",),
    ...     down="mlp.c_proj",
    ...     head=("lm_head",),
    ...     causal=True,
    ... )
    >>> register("starcoder2", lambda model: describe(model, starcoder2))

    One whose units lie differently builds its own ``Anatomy``. A later call for the same type wins.
    """
    _registered[model_type] = describe_model


def is_known(model_type: str) -> bool:
    """Return whether ``anatomy_of`` knows the architecture."""
    return model_type in _registered or model_type in LAYOUTS


def check_known(config: PretrainedConfig) -> None:
    """Raise the ``UserError`` that says what to do about an architecture without anatomy."""
    if is_known(config.model_type):
        return
    known = ", ".join(sorted({*LAYOUTS, *_registered} - {"dga_extended"}))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model_type} models are encoder-decoders, which are not trained here; encoders are, as "
            f"masked LMs, and decoders, as causal LMs. Give a model of one of these: {known}"
        )
    if hasattr(config, "text_config"):
        raise UserError(
            f"{config.model_type} models read more than text, and are not trained here. Give a model of text "
            f"alone, of one of these: {known}"
        )
    raise UserError(
        f"architecture {config.model_type!r} is not known here (known: {known}); name its modules in a file "
        "of about 15 lines and give it as --import FILE.py: docs/extending.md shows a whole one"
    )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the units of a model with an LM head.

    Reads the config, module names and parameter shapes only, so it works for models on the meta device and
    for parameters partitioned by ``deepspeed.zero.Init``.

    Raises:
        UserError: The architecture is unknown, the model has no LM head, or a module is missing or does not
            have the size that the config gives.

    """
    model_type = model.config.model_type
    check_known(model.config)
    if model_type in _registered:
        return _registered[model_type](model)
    return describe(model, layout_of(model.config))


def describe(model: PreTrainedModel, layout: Layout) -> Anatomy:
    """Build the anatomy of a model from the names of its modules.

    Raises:
        UserError: As ``anatomy_of``.

    """
    config = model.config
    num_layers = config.num_hidden_layers // layout.layer_uses
    blocks = [layout.block.format(layer) for layer in range(num_layers)]
    sizes = Sizes(
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden=config.hidden_size,
        intermediate=_matrix_shape(_module(model, f"{blocks[0]}.{layout.down}"))[0],
    )
    for name in layout.head:
        _module(model, name)
    in_a_block = projections_of_a_block(layout, sizes)
    of_relative = layout.relative_query, layout.relative_key
    projected = {f"{block}.{name}" for block in blocks for name, *_ in in_a_block}
    first = first_position(config, layout)
    positions = NO_LIMIT if layout.unlimited_positions else config.max_position_embeddings - first
    # By identity: named_parameters() may name tied embeddings by the decoder (XLM-R's head comes first).
    trunk = {id(parameter) for parameter in model.base_model.parameters()}
    modules = set(trunk_of(model).modules())
    return Anatomy(
        architecture=config.model_type,
        num_layers=len(blocks),
        num_heads=sizes.heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        vocab_size=config.vocab_size,
        causal=layout.causal or getattr(config, "is_decoder", False),
        max_positions=positions,
        first_position=first if layout.packs else None,
        projections=tuple(
            _projection(model, f"{block}.{name}", role, layer, inputs, outputs, layout)
            for layer, block in enumerate(blocks)
            for name, role, inputs, outputs in in_a_block
        ),
        lm_head_parameters=tuple(
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in trunk and name.startswith(tuple(f"{module}." for module in layout.head))
        ),
        head_modules=layout.head,
        head_takes_embeddings=layout.head_takes_embeddings,
        relative_projections=tuple(f"{block}.{name}" for block in blocks for name in of_relative if name),
        other_matrices=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, MATRICES)
            and module in modules
            and projected.isdisjoint(accumulate(name.split("."), "{}.{}".format))
        ),
        attention_norms=tuple(f"{block}.{layout.norm}" for block in blocks if layout.norm),
        parallel=layout.parallel,
        relative_columns=layout.relative_columns,
        layer_uses=layout.layer_uses,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _projection(
    model: PreTrainedModel,
    name: str,
    role: Role,
    layer: int,
    inputs: Channels,
    outputs: Channels,
    layout: Layout,
) -> Projection:
    """Find a projection in the model, and see that it has the size that the config gives it."""
    module = _module(model, name)
    found, expected = _matrix_shape(module), (len(inputs.numbers), len(outputs.numbers))
    if found != expected:
        raise UserError(
            f"{name} maps {found[0]} inputs to {found[1]} outputs where the config of this "
            f"{model.config.model_type} model gives {expected[0]} and {expected[1]}; pruned heads and layers "
            "of unlike sizes are not supported: train the unpruned model, or describe this one with "
            "dga_scale.backbone.anatomy.register"
        )
    transposed, bias = isinstance(module, Conv1D), module.bias is not None
    flat = layout.flat_ffn and role in ("up", "down")
    return Projection(name, role, layer, inputs, outputs, transposed, bias, flat)


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"this {type(model).__name__} has no module {name!r}, which {model.config.model_type} models "
            "have; load it with its LM head (AutoModelForMaskedLM or AutoModelForCausalLM), or describe a "
            "model built differently with dga_scale.backbone.anatomy.register"
        ) from None


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; ``deepspeed.zero.Init`` leaves ``shape`` empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a Linear, or of GPT-2's Conv1D, which stores the transpose."""
    first, second = whole_shape(module.get_parameter("weight"))
    return (first, second) if isinstance(module, Conv1D) else (second, first)
