"""The module names of each architecture's projections, read by ``anatomy.describe``."""

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one architecture's modules.

    ``block``, ``head`` are names in the whole model; the projections are names inside a block. Give either
    ``query``, ``key`` and ``value`` or one fused ``qkv``.
    """

    block: str
    """Module name of a transformer block, ``{}`` standing for its number: ``"bert.encoder.layer.{}"``."""
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    """One projection that holds queries, keys and values."""
    qkv_order: Literal["parts", "heads"] = "parts"
    """How ``qkv`` lays out its rows: all queries, all keys, all values; or head after head."""
    relative_query: str = ""
    """Projection of relative positions into query space, a block of rows per head (DeBERTa)."""
    relative_key: str = ""
    relative_columns: int = 0
    """Columns of attention scores against relative positions that every token computes in every layer."""
    output: str
    """Attention output projection: its input is the concatenation of the heads."""
    up: tuple[str, ...]
    """FFN projections into the intermediate units: one, or gate and up."""
    stacked_up: int = 1
    """2 where one ``up`` projection stacks gate and up, each of all intermediate units."""
    down: str
    """FFN projection back to the hidden size."""
    flat_ffn: bool = False
    """The FFN's projections are called with (batch * tokens, width), not (batch, tokens, width)."""
    layer_uses: int = 1
    """How many blocks in a row have the same weights (ALBERT): ``block`` numbers those that differ."""
    norm: str = ""
    """Norm in front of the attention; left out where norms stand behind the sublayers (BERT)."""
    head: tuple[str, ...]
    """Modules of the LM head in the order they are applied to the last hidden state."""
    head_takes_embeddings: bool = False
    """The last head module is called with the input embedding module as its second argument."""
    parallel: bool = False
    """Attention and FFN of a block read the same states, instead of the FFN what attention made of them."""
    causal: bool = False
    positions_after_padding: bool = False
    """Position ids start at ``pad_token_id + 1``, so the table holds that many positions no token can use."""
    positions_from: int = 0
    """Position id of a row's first token, otherwise."""
    unlimited_positions: bool = False
    """Attention is biased by distance (ALiBi): there is no table of positions, and no longest sequence."""
    packs: bool = False
    """Takes position ids, and masks of queries by keys, so that several rows can be read in one."""


_BERT = Layout(
    block="bert.encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    head=("cls",),
    packs=True,
)
_ROBERTA = replace(_BERT, block="roberta.encoder.layer.{}", head=("lm_head",), positions_after_padding=True)
_LLAMA = Layout(
    block="model.layers.{}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norm="input_layernorm",
    head=("lm_head",),
    causal=True,
    packs=True,
)

LAYOUTS: dict[str, Layout] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": replace(_ROBERTA, norm="attention.self_attn_layer_norm"),
    "camembert": _ROBERTA,
    "electra": replace(
        _BERT, block="electra.encoder.layer.{}", head=("generator_predictions", "generator_lm_head")
    ),
    "distilbert": Layout(
        block="distilbert.transformer.layer.{}",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
        head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        packs=True,
    ),
    "modernbert": Layout(
        block="model.layers.{}",
        qkv="attn.Wqkv",
        output="attn.Wo",
        up=("mlp.Wi",),
        stacked_up=2,
        down="mlp.Wo",
        norm="attn_norm",
        head=("head", "decoder"),
        packs=True,
    ),
    "deberta-v2": replace(
        _BERT,
        block="deberta.encoder.layer.{}",
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        packs=False,
    ),
    "gpt2": Layout(
        block="transformer.h.{}",
        qkv="attn.c_attn",
        output="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        norm="ln_1",
        head=("lm_head",),
        causal=True,
        packs=True,
    ),
    "gpt_neox": Layout(
        block="gpt_neox.layers.{}",
        qkv="attention.query_key_value",
        qkv_order="heads",
        output="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        norm="input_layernorm",
        head=("lm_head",),
        causal=True,
        packs=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "eurobert": replace(_LLAMA, causal=False),
    "phi": replace(_LLAMA, output="self_attn.dense", up=("mlp.fc1",), down="mlp.fc2", parallel=True),
    "phi3": replace(
        _LLAMA, query="", key="", value="", qkv="self_attn.qkv_proj", up=("mlp.gate_up_proj",), stacked_up=2
    ),
    "opt": replace(
        _LLAMA,
        block="model.decoder.layers.{}",
        output="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        norm="self_attn_layer_norm",
        flat_ffn=True,
    ),
    "bloom": Layout(
        block="transformer.h.{}",
        qkv="self_attention.query_key_value",
        qkv_order="heads",
        output="self_attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        norm="input_layernorm",
        head=("lm_head",),
        causal=True,
        unlimited_positions=True,
    ),
    "mpnet": Layout(
        block="mpnet.encoder.layer.{}",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        up=("intermediate.dense",),
        down="output.dense",
        head=("lm_head",),
        positions_from=2,
        packs=True,
    ),
    "albert": Layout(
        block="albert.encoder.albert_layer_groups.{}.albert_layers.0",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        up=("ffn",),
        down="ffn_output",
        head=("predictions",),
        packs=True,
    ),
    "nomic_bert": replace(_LLAMA, block="nomic_bert.layers.{}", norm="", head=("cls",), causal=False),
}
"""Layout of each architecture by its ``config.model_type``."""


def first_position(config: PretrainedConfig, layout: Layout) -> int:
    """Return the position id of a row's first token: the table's entries before it are no token's."""
    return config.pad_token_id + 1 if layout.positions_after_padding else layout.positions_from


def layout_of(config: PretrainedConfig) -> Layout:
    """Return the layout of a known architecture, completed by what its config says."""
    layout = LAYOUTS[config.model_type]
    if config.model_type == "deberta-v2":
        return _deberta_v2(layout, config)
    if config.model_type == "albert":
        return replace(layout, layer_uses=config.num_hidden_layers // config.num_hidden_groups)
    if config.model_type == "gpt_neox":
        return replace(layout, parallel=config.use_parallel_residual)
    if config.model_type == "opt" and not config.do_layer_norm_before:
        return replace(layout, norm="")
    return layout


def _deberta_v2(layout: Layout, config: PretrainedConfig) -> Layout:
    """Complete DeBERTa's: its disentangled attention and its two kinds of LM head depend on the config."""
    if not config.legacy:
        layout = replace(layout, head=("lm_predictions",), head_takes_embeddings=True)
    if not getattr(config, "relative_attention", False):
        return layout
    terms = config.pos_att_type or []
    # The same order of precedence as in transformers' DisentangledSelfAttention.
    span = max(getattr(config, "position_buckets", -1), 0) or max(config.max_relative_positions, 0)
    span = span or config.max_position_embeddings
    own = not getattr(config, "share_att_key", False)
    return replace(
        layout,
        relative_key="attention.self.pos_key_proj" if own and "c2p" in terms else "",
        relative_query="attention.self.pos_query_proj" if own and "p2c" in terms else "",
        relative_columns=2 * span * len({"c2p", "p2c"}.intersection(terms)),
    )
