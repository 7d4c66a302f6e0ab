"""A small random model of every architecture: one table for all tests of the backbone."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dga_scale.backbone.anatomy import NO_LIMIT

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 34,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Tiny:
    """How to build one: ``model_type``, config values, and what the anatomy should say of it."""

    model_type: str
    values: dict[str, Any] = field(default_factory=lambda: SIZES)
    causal: bool = False
    max_positions: int = 34
    kv_heads: int = 4
    sdpa: bool = True
    """Whether transformers has more than plain products for its attention."""
    checkpoints: bool = True
    """Whether transformers can recompute its blocks."""

    def config(self, **values: Any) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **{**COMMON, **self.values, **values})

    def model(
        self, *, attn_implementation: str = "eager", random_biases: bool = True, **values: Any
    ) -> PreTrainedModel:
        """Random weights; biases too, which transformers would leave at zero."""
        auto = AutoModelForCausalLM if self.causal else AutoModelForMaskedLM
        model = auto.from_config(self.config(**values), attn_implementation=attn_implementation)
        for name, parameter in model.named_parameters():
            if random_biases and name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()


ROBERTA = Tiny("roberta", max_positions=32)
LLAMA = Tiny("llama", GROUPED, causal=True, kv_heads=2)
DEBERTA_RELATIVE = {
    **SIZES,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "hidden_act": "gelu",
}

TINY: dict[str, Tiny] = {
    "bert": Tiny("bert"),
    "roberta": ROBERTA,
    "xlm-roberta": Tiny("xlm-roberta", max_positions=32),
    "xlm-roberta-xl": Tiny("xlm-roberta-xl", max_positions=32),
    "camembert": Tiny("camembert", max_positions=32),
    "distilbert": Tiny(
        "distilbert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 34},
    ),
    "electra": Tiny("electra", {**SIZES, "embedding_size": 24}),
    "modernbert": Tiny("modernbert", {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8}),
    "modernbert with biases": Tiny(
        "modernbert", {**SIZES, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
    ),
    "deberta-v2": Tiny("deberta-v2", sdpa=False),
    "deberta-v2 relative": Tiny("deberta-v2", DEBERTA_RELATIVE, sdpa=False),
    "deberta-v3": Tiny(
        "deberta-v2",
        {
            **DEBERTA_RELATIVE,
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "legacy": False,
        },
        sdpa=False,
    ),
    "gpt2": Tiny("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 34}, causal=True),
    "llama": LLAMA,
    "llama with biases": Tiny(
        "llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, causal=True, kv_heads=2
    ),
    "llama tied": Tiny("llama", {**SIZES, "tie_word_embeddings": True}, causal=True),
    "mistral": Tiny(
        "mistral", {**GROUPED, "num_key_value_heads": 1, "head_dim": None}, causal=True, kv_heads=1
    ),
    "qwen2": Tiny("qwen2", GROUPED, causal=True, kv_heads=2),
    "qwen3": Tiny("qwen3", {**GROUPED, "head_dim": 12}, causal=True, kv_heads=2),
    "gpt_neox": Tiny("gpt_neox", SIZES, causal=True),
    "phi3": Tiny("phi3", GROUPED, causal=True, kv_heads=2),
    "phi": Tiny("phi", {**GROUPED, "qk_layernorm": True}, causal=True, kv_heads=2),
    "gemma": Tiny("gemma", {**GROUPED, "num_key_value_heads": 1, "head_dim": 12}, causal=True, kv_heads=1),
    "gemma2": Tiny(
        "gemma2",
        {**GROUPED, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 12},
        causal=True,
        kv_heads=2,
        sdpa=False,
    ),
    "gemma3": Tiny(
        "gemma3_text",
        {
            **GROUPED,
            "head_dim": 12,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 20.0,
        },
        causal=True,
        kv_heads=2,
    ),
    "opt": Tiny("opt", {**SIZES, "ffn_dim": 48, "init_std": 0.3, "activation_function": "gelu"}, causal=True),
    "opt narrow": Tiny(
        "opt",
        {
            **SIZES,
            "ffn_dim": 48,
            "init_std": 0.3,
            "activation_function": "gelu",
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
        },
        causal=True,
    ),
    "bloom": Tiny(
        "bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        causal=True,
        max_positions=NO_LIMIT,
        sdpa=False,
    ),
    "mpnet": Tiny("mpnet", max_positions=32, sdpa=False, checkpoints=False),
    "albert": Tiny(
        "albert",
        {**SIZES, "num_hidden_layers": 6, "num_hidden_groups": 2, "embedding_size": 24},
        checkpoints=False,
    ),
    "nomic_bert": Tiny("nomic_bert"),
    "eurobert": Tiny("eurobert", GROUPED, kv_heads=2),
}


def batch(rows: int = 3, tokens: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Draw ``input_ids`` and ``attention_mask`` (rows, tokens) with a padded tail in the last row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, -3:] = 0
    input_ids[-1, -3:] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
