"""What can't be used of a model's folder, its config and its weights, each told in one line."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from dga_scale.backbone.architectures import LAYOUTS, first_position
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import read_object

_INDEX = "model.safetensors.index.json"
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_MOST_LAYERS = 10_000
"""Layers are built one by one, which takes for ever where a number is wrong."""
_OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "embedding_size",
    "ffn_dim",
    "word_embed_proj_dim",
    "num_hidden_groups",
    "sliding_window",
    "local_attention",
    "n_inner",
)
_ABOVE_0 = (
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "norm_eps",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""The names of fields that architectures call alike, or map to these."""


def check_folder(folder: Path) -> None:
    """Refuse a folder of another format, which transformers would refuse in other words, or half load.

    Raises:
        UserError: An adapter, GGUF or a nested folder, or an index of weights that lie elsewhere; it says
            what to give instead.
    """
    weights = any(folder.glob("*.safetensors"))
    if (adapter := folder / "adapter_config.json").is_file():
        content = read_object(adapter)
        base, task = content.get("base_model_name_or_path") or "BASE", content.get("task_type")
        auto = "AutoModelForCausalLM" if task == "CAUSAL_LM" else "AutoModelForMaskedLM"
        beside = " beside whole weights" if (folder / "config.json").is_file() and weights else ""
        raise UserError(
            f"it holds a PEFT adapter{beside}, which is not trained on. Merge it with its base first: "
            f"python -c \"import peft, transformers as t; m = t.{auto}.from_pretrained('{base}'); "
            f"peft.PeftModel.from_pretrained(m, '{folder}').merge_and_unload().save_pretrained('merged'); "
            f"t.AutoTokenizer.from_pretrained('{base}').save_pretrained('merged')\" and give merged",
            folder,
        )
    if (index := folder / _INDEX).is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError("no weight_map of tensors to files in it. Download it again", index)
        if outside := next(
            (name for name in names.values() if Path(name).name != name or not name.isprintable()), None
        ):
            raise UserError(f"its weight_map names {outside!r}, which is no file of this folder", index)
    if (folder / "config.json").is_file():
        return
    if any(folder.glob("*.gguf")):
        raise UserError(
            "its weights are GGUF, for inference. Give the folder of the model that they were made from",
            folder,
        )
    if (nested := folder / "0_Transformer" / "config.json").is_file():
        raise UserError(
            f"a sentence-transformers folder of the old layout. Give {nested.parent}, its transformer", folder
        )
    if folder.is_dir():
        raise UserError("no config.json in it. Give a folder that save_pretrained wrote", folder)


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse a config with values that no model is built of.

    Raises:
        UserError: It names the field, its value and what it must be; or the weights are quantised.
    """

    def refuse(field: str, what: str) -> NoReturn:
        stored = config.attribute_map.get(field, field)
        raise UserError(f"config.json: {stored} is {getattr(config, field)!r}: {what}", name)

    for field in (*_SIZES, *_OPTIONAL_SIZES):
        size = getattr(config, field, 1)
        if size is None and field in _OPTIONAL_SIZES:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            refuse(field, "must be a whole number above 0")
        if size > (most := _MOST_LAYERS if field == "num_hidden_layers" else 2**31):
            refuse(field, f"must be at most {most:,}")
    for field in _ABOVE_0:
        if (number := getattr(config, field, None)) is not None and not 0 < number < math.inf:
            refuse(field, "must be above 0")
    for field, number in config.to_dict().items():
        dropout = "dropout" in field or field.endswith("_pdrop")
        if dropout and isinstance(number, int | float) and not 0 <= number <= 1:
            refuse(field, "must be from 0 to 1")
    for field in _ACTIVATIONS:
        if isinstance(found := getattr(config, field, None), str) and found not in ACT2FN:
            refuse(field, f"transformers knows {', '.join(sorted(ACT2FN))}")
    padding, layout = getattr(config, "pad_token_id", None), LAYOUTS.get(config.model_type)
    needed = layout is not None and layout.positions_after_padding
    if (padding is None and needed) or not (padding is None or -1 <= padding < config.vocab_size):
        refuse("pad_token_id", f"must be a token's id, from 0 to {config.vocab_size - 1}")
    for field, rule in _of_architecture(config):
        refuse(field, rule)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"its weights are quantised ({method or 'quantization_config'} in config.json), and can't be "
            "trained. Give the model that they were made from",
            name,
        )


def _of_architecture(config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """Yield the fields that an architecture can't have as they are, and what they must be."""
    kind, heads = config.model_type, getattr(config, "num_attention_heads", 1)
    if getattr(config, "head_dim", None) is None and kind in LAYOUTS and config.hidden_size % heads:
        yield "num_attention_heads", f"must divide hidden_size, which is {config.hidden_size}"
    if heads % (getattr(config, "num_key_value_heads", None) or heads):
        yield "num_key_value_heads", f"must divide num_attention_heads, which is {heads}"
    if getattr(config, "use_bidirectional_attention", False):
        yield "use_bidirectional_attention", "a model that sees what it should predict can't be trained to"
    if kind == "albert":
        if config.inner_group_num != 1:
            yield "inner_group_num", "must be 1, as in all published ALBERT models"
        if config.num_hidden_layers % config.num_hidden_groups:
            yield "num_hidden_groups", f"must divide num_hidden_layers, which is {config.num_hidden_layers}"
    if kind == "bloom" and config.pretraining_tp > 1 and config.slow_but_exact:
        yield "slow_but_exact", "must be false: it goes past the modules in which units are found"
    if kind == "mpnet" and config.relative_attention_num_buckets < 32:
        yield "relative_attention_num_buckets", "must be at least 32, all of which transformers reads"
    if kind == "opt" and config.layerdrop:
        yield "layerdrop", "must be 0: ranks would drop different layers"
    layout = LAYOUTS.get(kind)
    if layout is not None and not layout.unlimited_positions:
        first = first_position(config, layout)
        if config.max_position_embeddings <= first:
            yield "max_position_embeddings", f"must be above {first}, where positions begin"


def check_finite(model: PreTrainedModel, name_or_path: str) -> None:
    """Refuse a model of which a weight is a NaN or infinity; what ZeRO-3 has partitioned is not looked at.

    Raises:
        UserError: It names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter.detach()):
            raise UserError(
                f"{name} holds a NaN or infinity: its training went wrong, or the file was damaged. Give "
                "another checkpoint of the model",
                name_or_path,
            )


def all_finite(values: Tensor) -> bool:
    """Return whether no entry of a tensor of any shape, which may be empty, is a NaN or infinity."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def unloadable(name: str, error: Exception) -> UserError:
    """Return the refusal of a model that transformers can't build and load."""
    reason = str(error).strip().split("\n")[0]
    return UserError(
        f"transformers can't load it ({type(error).__name__}: {reason}). Compare its config.json and weights "
        "with those that were published",
        name,
    )
