"""Where the units of a language model live: heads, FFN units and the LM head, found from its module names."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dga_scale.backbone.architectures import LAYOUTS, Layout, layout_of
from dga_scale.errors import UserError

Role = Literal["query", "key", "value", "output", "up", "down"]
Kind = Literal["heads", "intermediate", "neurons"]

KINDS: tuple[Kind, ...] = ("heads", "intermediate", "neurons")
"""Kinds of unit: attention heads, the FFN's intermediate units, the outputs of the FFN's down projection."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Which entries of one parameter belong to which units of a layer.

    Index ``i`` along ``dim`` of ``parameter`` belongs to the units ``owners[i]``; -1 stands for none. Only
    grouped key and value projections have more than one owner an index. ``owners`` is a CPU long tensor
    (size along dim, k), shared between layers.
    """

    parameter: str
    """Name as in ``model.named_parameters()``."""
    role: Role
    kind: Kind
    layer: int
    dim: int
    owners: Tensor


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Sizes and places of a model's units. Plain data: holds no reference to the model it was read from."""

    architecture: str
    """The config's ``model_type``."""
    num_layers: int
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
    slabs: tuple[Slab, ...]
    attention_outputs: tuple[str, ...]
    """Per layer: module name of the attention output projection; its input is (..., heads * head_dim)."""
    ffn_outputs: tuple[str, ...]
    """Per layer: module name of the down projection, (..., intermediate_size) to (..., hidden_size)."""
    lm_head_parameters: tuple[str, ...]
    """Parameters that only the LM head has; a decoder tied to the embeddings is not among them."""
    head_modules: tuple[str, ...]
    head_takes_embeddings: bool
    trunk_weights: int
    """Entries of the trunk's weight matrices: each token is multiplied by every one of them."""
    head_weights: int
    """Entries of the LM head's weight matrices, the decoder included, tied or not."""
    relative_columns: int
    """Columns of attention scores against relative positions, per token and layer (DeBERTa)."""

    def units(self, kind: str) -> int:
        """Units of a kind in one layer."""
        sizes = {"heads": self.num_heads, "intermediate": self.intermediate_size, "neurons": self.hidden_size}
        return sizes[kind]

    def trunk(self, model: PreTrainedModel) -> nn.Module:
        """Return the model without its LM head.

        Called with ``input_ids`` and ``attention_mask`` (batch, tokens); gives ``.last_hidden_state``
        (batch, tokens, hidden_size).
        """
        return model.base_model

    def lm_logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Compute logits (..., vocab_size) of last hidden states (..., hidden_size) with the model's LM head.

        The modules are called, not copied, so that hooks on them (ZeRO-3 gathers parameters in such) run.
        """
        *first, last = (model.get_submodule(name) for name in self.head_modules)
        for module in first:
            hidden = module(hidden)
        if self.head_takes_embeddings:
            return last(hidden, model.get_input_embeddings())
        return last(hidden)

    def forward_flops(self, tokens: int, sequence_length: int, head_tokens: int) -> float:
        """Floating-point operations of matrix products in one forward pass.

        A multiply-add is two operations. Attention counts the full square of scores, for causal and windowed
        attention too (as PaLM does, arXiv 2204.02311, appendix B). A backward pass costs twice as much.
        DeBERTa's projections of its relative position table, made once a batch, are left out.

        Args:
            tokens: rows of the trunk's input, padding included (batch * sequence_length).
            sequence_length: keys that each token attends to.
            head_tokens: rows that the LM head is applied to.

        """
        score_columns = 2 * sequence_length + self.relative_columns  # queries by keys, scores by values
        attention = self.num_layers * self.num_heads * self.head_dim * score_columns
        return 2.0 * (tokens * (self.trunk_weights + attention) + head_tokens * self.head_weights)


_registered: dict[str, Callable[[PreTrainedModel], Anatomy]] = {}


def register(model_type: str, describe_model: Callable[[PreTrainedModel], Anatomy]) -> None:
    """Teach ``anatomy_of`` an architecture, by the ``model_type`` of its config.

    Most need only the names of their modules; ``print(model)`` shows them:

    >>> from dga_scale.backbone.anatomy import describe, register
    >>> from dga_scale.backbone.architectures import Layout
    >>> mpnet = Layout(
    ...     block="mpnet.encoder.layer.{}",
    ...     query="attention.attn.q",
    ...     key="attention.attn.k",
    ...     value="attention.attn.v",
    ...     output="attention.attn.o",
    ...     up=("intermediate.dense",),
    ...     down="output.dense",
    ...     head=("lm_head",),
    ...     positions_after_padding=True,
    ... )
    >>> register("mpnet", lambda model: describe(model, mpnet))

    One whose units lie differently builds its own ``Anatomy``. A later call for the same type wins.
    """
    _registered[model_type] = describe_model


def is_known(model_type: str) -> bool:
    """Whether ``anatomy_of`` knows the architecture."""
    return model_type in _registered or model_type in LAYOUTS


def check_known(model_type: str) -> None:
    """Raise the ``UserError`` that says how to register an unknown architecture."""
    if not is_known(model_type):
        known = ", ".join(sorted({*LAYOUTS, *_registered}))
        raise UserError(
            f"architecture {model_type!r} is not known here (known: {known}); name its modules in about 15 "
            "lines with dga_scale.backbone.anatomy.register, whose docstring shows an example"
        )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the units of a model with an LM head.

    Reads the config, module names and parameter shapes only, so it works for models on the meta device and
    for parameters partitioned by ``deepspeed.zero.Init``.

    Raises:
        UserError: the architecture is unknown, the model has no LM head, or a module is missing or does not
            have the size that the config gives.

    """
    model_type = model.config.model_type
    check_known(model_type)
    if model_type in _registered:
        return _registered[model_type](model)
    return describe(model, layout_of(model.config))


def describe(model: PreTrainedModel, layout: Layout) -> Anatomy:
    """Build the anatomy of a model from the names of its modules.

    Raises:
        UserError: as ``anatomy_of``.

    """
    config = model.config
    blocks = [layout.block.format(layer) for layer in range(config.num_hidden_layers)]
    sizes = _Sizes(
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden=config.hidden_size,
        intermediate=_matrix_shape(_module(model, f"{blocks[0]}.{layout.down}"))[0],
    )
    head = [_module(model, name) for name in layout.head]
    parts = _parts(layout, sizes)
    relative = [name for name in (layout.relative_query, layout.relative_key) if name]
    first_position = config.pad_token_id + 1 if layout.positions_after_padding else 0
    # By identity: named_parameters() may name tied embeddings by the decoder (XLM-R's head comes first).
    trunk = {id(parameter) for parameter in model.base_model.parameters()}
    return Anatomy(
        architecture=config.model_type,
        num_layers=len(blocks),
        num_heads=sizes.heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        vocab_size=config.vocab_size,
        causal=layout.causal or getattr(config, "is_decoder", False),
        max_positions=config.max_position_embeddings - first_position,
        first_position=first_position if layout.packs else None,
        slabs=tuple(
            slab
            for layer, block in enumerate(blocks)
            for part in parts
            for slab in _slabs(model, f"{block}.{part.module}", part, layer)
        ),
        attention_outputs=tuple(f"{block}.{layout.output}" for block in blocks),
        ffn_outputs=tuple(f"{block}.{layout.down}" for block in blocks),
        lm_head_parameters=tuple(
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in trunk and name.startswith(tuple(f"{module}." for module in layout.head))
        ),
        head_modules=layout.head,
        head_takes_embeddings=layout.head_takes_embeddings,
        trunk_weights=_matrix_entries(model.base_model)
        - sum(_matrix_entries(_module(model, f"{block}.{name}")) for block in blocks for name in relative),
        head_weights=sum(_matrix_entries(module) for module in head)
        + (config.vocab_size * sizes.hidden if layout.head_takes_embeddings else 0),
        relative_columns=layout.relative_columns,
    )


@dataclass(frozen=True)
class _Sizes:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, eq=False)
class _Part:
    """A projection inside a block; its output rows (of "output", its input columns) belong to ``owners``."""

    module: str
    role: Role
    kind: Kind
    owners: Tensor  # (rows, or columns, of the projection; k)
    width: int
    """Size of the projection's other axis."""


def _parts(layout: Layout, sizes: _Sizes) -> list[_Part]:
    # device="cpu" everywhere: a caller may build its model inside torch.device("meta").
    units = torch.arange(sizes.heads, device="cpu")
    heads = units.view(-1, 1).repeat_interleave(sizes.head_dim, dim=0)  # (heads * head_dim, 1)
    kv = units.view(sizes.kv_heads, -1).repeat_interleave(
        sizes.head_dim, dim=0
    )  # (kv_heads * head_dim, group)
    owners: dict[Role, Tensor] = {"query": heads, "key": kv, "value": kv}
    modules: dict[Role, str] = {"query": layout.query, "key": layout.key, "value": layout.value}
    if layout.qkv:
        owners = _fused(owners, layout.qkv_order)
        modules = dict.fromkeys(modules, layout.qkv)
    parts = [_Part(modules[role], role, "heads", owners[role], sizes.hidden) for role in modules]
    if layout.relative_query:
        parts.append(_Part(layout.relative_query, "query", "heads", heads, sizes.hidden))
    if layout.relative_key:
        parts.append(_Part(layout.relative_key, "key", "heads", kv, sizes.hidden))
    parts.append(_Part(layout.output, "output", "heads", heads, sizes.hidden))
    intermediate = torch.arange(sizes.intermediate, device="cpu").view(-1, 1)
    # One projection may stack gate and up: rows u and intermediate + u then both make unit u.
    stacked = intermediate.repeat(layout.stacked_up, 1)
    parts += [_Part(name, "up", "intermediate", stacked, sizes.hidden) for name in layout.up]
    neurons = torch.arange(sizes.hidden, device="cpu").view(-1, 1)
    parts.append(_Part(layout.down, "down", "neurons", neurons, sizes.intermediate))
    return parts


def _fused(owners: dict[Role, Tensor], order: Literal["parts", "heads"]) -> dict[Role, Tensor]:
    """Spread each role's owners over one projection of queries, keys and values; -1 on others' rows."""
    lengths = [len(rows) for rows in owners.values()]
    index = torch.arange(sum(lengths), device="cpu")
    if order == "parts":
        places = index.split(lengths)
    else:
        heads = int(owners["query"].max()) + 1
        places = index.view(heads, 3, -1).transpose(0, 1).flatten(1).unbind()
    fused = {}
    for (role, rows), place in zip(owners.items(), places, strict=True):
        fused[role] = torch.full((len(index), rows.shape[1]), -1, device="cpu")
        fused[role][place] = rows
    return fused


def _slabs(model: PreTrainedModel, name: str, part: _Part, layer: int) -> Iterator[Slab]:
    """Make the slabs of one projection's weight and, where its output rows are owned, of its bias."""
    module = _module(model, name)
    rows = part.role != "output"
    inputs, outputs = _matrix_shape(module)
    expected = (part.width, len(part.owners)) if rows else (len(part.owners), part.width)
    if (inputs, outputs) != expected:
        raise UserError(
            f"{name} maps {inputs} inputs to {outputs} outputs where the config of this "
            f"{model.config.model_type} model gives {expected[0]} and {expected[1]}; pruned heads and layers "
            "of unlike sizes are not supported: train the unpruned model, or describe this one with "
            "dga_scale.backbone.anatomy.register"
        )
    input_dim, output_dim = (0, 1) if isinstance(module, Conv1D) else (1, 0)
    dim = output_dim if rows else input_dim
    yield Slab(f"{name}.weight", part.role, part.kind, layer, dim, part.owners)
    if rows and module.bias is not None:
        yield Slab(f"{name}.bias", part.role, part.kind, layer, 0, part.owners)


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"this {type(model).__name__} has no module {name!r}, which {model.config.model_type} models "
            "have; load it with its LM head (AutoModelForMaskedLM or AutoModelForCausalLM), or describe a "
            "model built differently with dga_scale.backbone.anatomy.register"
        ) from None


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; ``deepspeed.zero.Init`` leaves ``shape`` empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a Linear, or of GPT-2's Conv1D, which stores the transpose."""
    first, second = _shape(module.get_parameter("weight"))
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _matrix_entries(module: nn.Module) -> int:
    """Count the entries of all weight matrices in a module: what one token is multiplied by."""
    matrices = (part for part in module.modules() if isinstance(part, (nn.Linear, Conv1D, nn.Conv1d)))
    return sum(math.prod(_shape(matrix.weight)) for matrix in matrices)
