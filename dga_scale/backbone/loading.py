"""Pretrained weights and tokenizer from a folder or the Hugging Face hub, checked before they are used."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dga_scale.backbone.anatomy import Anatomy, anatomy_of, check_known
from dga_scale.backbone.checks import check_config, check_finite, check_folder, unloadable
from dga_scale.backbone.extended import ExtendedConfig, is_masked
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.storage.hub import local_only

_END_TASK_DROPOUT = ("classifier", "summary", "qa_", "seq_classif", "pooler", "cls_")
"""Beginnings of dropout settings that only heads of end tasks read; no LM has those."""


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration, known before its weights are read."""

    name_or_path: str
    config: PretrainedConfig
    causal: bool
    """Whether it is trained as a causal LM; otherwise as a masked LM."""

    @property
    def hidden_size(self) -> int:
        """The size of the hidden states."""
        return self.config.hidden_size

    @property
    def extended(self) -> bool:
        """Whether the model is one of ours with an extension, which has to be loaded whole on each rank."""
        return isinstance(self.config, ExtendedConfig)


@dataclass(frozen=True)
class LoadedModel:
    """A model with an LM head, its tokenizer and its anatomy."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    config: PretrainedConfig
    """As published: ``model.config`` has another dropout where that was overridden, and no cache."""
    new_parameters: tuple[str, ...]
    """Parameters of the LM head that the checkpoint does not have: randomly initialised."""

    @property
    def missing_head(self) -> bool:
        """Whether the LM head, or a part of it, has to be warmed up before the model is of use."""
        return bool(self.new_parameters)


def load_model_config(name_or_path: str, *, any_architecture: bool = False) -> ModelConfig:
    """Read a model's config, and choose between masked and causal LM by its architecture.

    Args:
        name_or_path: The folder, or the name on the Hugging Face hub.
        any_architecture: Whether one without anatomy is taken, for what needs no units and no LM head.

    Raises:
        UserError: No such folder or hub name, a config that can't be read, an unknown architecture.

    """
    looks_like_path = os.path.isabs(name_or_path) or name_or_path.startswith((".", "~"))
    if not os.path.isdir(name_or_path) and (looks_like_path or name_or_path.count("/") > 1):
        raise UserError(
            "no such folder. Give a folder with config.json and safetensors, or a model's name on the "
            "Hugging Face hub",
            name_or_path,
        )
    folder = Path(name_or_path)
    if checkpoint := next((each for each in (folder, folder.parent) if _is_checkpoint(each)), None):
        run, step = checkpoint.parent.parent, checkpoint.name.removeprefix("step-").lstrip("0")
        raise UserError(
            "a checkpoint, not a model. Write the model first: tools/consolidate_checkpoint.py "
            f"{run} --step {step} --output DIR, and give DIR",
            name_or_path,
        )
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").exists():
        raise UserError(f"a run's folder, not a model's. Did you mean {folder / 'model'}?", name_or_path)
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=local_only(name_or_path)
        )
    except Exception as error:  # OSError, ValueError, KeyError, TypeError... by what is wrong with the file
        reason = str(error).strip().split("\n")[0]
        advice = (
            "Give a folder that save_pretrained wrote; code from a model's own repository is never run"
            if os.path.isdir(name_or_path)
            else "There is no folder of that name either. Where the hub can't be reached, download the model "
            f"elsewhere (hf download {name_or_path} --local-dir DIR) and give the folder"
        )
        raise UserError(f"the model's config can't be loaded: {reason} {advice}", name_or_path) from error
    if not any_architecture:
        check_known(config)
    check_config(_of_base(config), name_or_path)
    return ModelConfig(name_or_path, config, causal=not is_masked(config))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "trainer_state.json").is_file() and (folder / "manifest.json").is_file()


def load_model(
    name_or_path: str,
    *,
    dropout: float | None = None,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_new_head: bool = False,
    random_init: bool = False,
) -> LoadedModel:
    """Load a masked or causal LM with its tokenizer; safetensors only, no code from the model's repository.

    The weights land on the CPU, or partitioned over the ranks where ``transformers`` knows of ZeRO-3
    (``HfDeepSpeedConfig``).

    Args:
        name_or_path: The folder, or the name on the Hugging Face hub.
        dropout: The value of every dropout probability of the trunk; None keeps those of the config.
        attn_implementation: "sdpa", "eager", "flash_attention_2"...; None lets transformers choose.
        dtype: The dtype of the parameters, whatever the checkpoint's.
        allow_new_head: Whether a checkpoint whose LM head is missing, wholly or in part, is accepted.
        random_init: Whether weights are drawn as the architecture does, from torch's seed, and none read.

    Raises:
        UserError: What ``load_model_config`` refuses; weights that are missing, damaged, pickled, of other
            shapes than the config says, not finite, or without an LM head; a tokenizer with more tokens than
            the model, or without a mask token for a masked LM; an attention implementation that can't be had.

    """
    found = load_model_config(name_or_path)
    published = copy.deepcopy(found.config)
    if dropout is not None:
        set_dropout(found.config, dropout)
    tokenizer = load_tokenizer(name_or_path)
    check_vocabulary(found, tokenizer)
    if not found.causal and tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer has no mask token, which a masked LM ({found.config.model_type}) needs; set "
            "mask_token in its tokenizer_config.json",
            name_or_path,
        )
    if random_init:
        auto = AutoModelForCausalLM if found.causal else AutoModelForMaskedLM
        try:
            model = auto.from_config(found.config, dtype=dtype, attn_implementation=attn_implementation)
        except Exception as error:  # whatever a class of transformers says to a config
            raise unloadable(name_or_path, error) from error
        missing: set[str] = set()
    else:
        model, missing = _load_weights(found, attn_implementation, dtype)
    anatomy = anatomy_of(model)
    # Aliases of tied parameters are listed too: a bias of the head under both its names.
    new = [name for name, _ in model.named_parameters() if name in missing]
    lost = [name for name in new if name not in anatomy.lm_head_parameters]
    if lost:
        raise UserError(
            f"the weights lack {len(lost)} parameters of the {found.config.model_type} trunk, {lost[0]} "
            "first; they belong to another model than config.json describes",
            name_or_path,
        )
    if new and not allow_new_head:
        raise UserError(
            f"the weights have no whole LM head ({', '.join(new)} missing), so the model can't predict "
            "tokens; have one trained first with --head_warmup_steps 300, or give a checkpoint of "
            f"{type(model).__name__}{_deberta_v3_hint(found)}",
            name_or_path,
        )
    check_finite(model, name_or_path)
    if anatomy.causal:
        model.config.use_cache = False  # keys and values kept for generation would only cost memory here
    return LoadedModel(model, tokenizer, anatomy, published, tuple(new))


def has_dropout(config: PretrainedConfig) -> bool:
    """Return whether two forward passes of the model in train mode differ."""
    config = _of_base(config)
    return any(getattr(config, name) > 0 for name in _dropout_settings(config))


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability that the trunk reads, whatever the architecture calls it.

    Raises:
        UserError: ``probability`` is not in [0, 1), or the config has no dropout setting.

    """
    if not 0 <= probability < 1:
        raise UserError(f"dropout {probability}: must be from 0 to below 1")
    config = _of_base(config)
    names = _dropout_settings(config)
    if not names:
        raise UserError(
            f"{config.model_type} models have no dropout setting, so dropout can't be {probability}"
        )
    for name in names:
        setattr(config, name, probability)


def _of_base(config: PretrainedConfig) -> PretrainedConfig:
    return config.base if isinstance(config, ExtendedConfig) and config.base is not None else config


def _dropout_settings(config: PretrainedConfig) -> list[str]:
    return [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("_pdrop"))
        and isinstance(value, (int, float))
        and not name.startswith(_END_TASK_DROPOUT)
    ]


def check_vocabulary(found: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model's embeddings.

    Raises:
        UserError: It has more: a text that holds one of these would end in an error of an index.
    """
    if len(tokenizer) > found.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embeddings {found.config.vocab_size}; "
            "put the tokenizer that the model was trained with beside its weights. "
            "tools/extend_vocabulary.py adds terms to both",
            found.name_or_path,
        )


def _load_weights(
    found: ModelConfig, attn_implementation: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model and the names that its checkpoint lacks."""
    name = found.name_or_path
    auto = AutoModelForCausalLM if found.causal else AutoModelForMaskedLM
    if _has_pickles_only(Path(name)):
        raise _pickled(name, auto.__name__)
    try:
        with _without_loading_report():
            loaded = auto.from_pretrained(
                name,
                config=found.config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=False,
                local_files_only=local_only(name),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if "cannot be loaded with `safetensors`" in reason:  # transformers' words for a hub model without any
            raise _pickled(name, auto.__name__) from error
        raise UserError(
            f"the weights can't be read: {reason}. The folder needs whole safetensors files "
            "(model.safetensors, or its shards with model.safetensors.index.json); copy or download it again",
            _damaged(Path(name)) or name,
        ) from error
    except Exception as error:  # whatever a class of transformers says to a config that it can't be built of
        if attn_implementation is not None and isinstance(error, ImportError | ValueError):
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise UserError(
                f"--attn_implementation {attn_implementation} can't be used with {name}: {reason}. Leave it "
                "out, or give sdpa or eager"
            ) from error
        raise unloadable(name, error) from error
    if info["mismatched_keys"]:
        parameter, stored, expected = min(info["mismatched_keys"])
        raise UserError(
            f"{parameter} is stored as {tuple(stored)} where config.json asks for {tuple(expected)}; the "
            "weights and config.json belong to different models",
            name,
        )
    return model, set(info["missing_keys"])


def _damaged(folder: Path) -> Path | None:
    """Return the first file of weights whose header or size is wrong; None where none is found."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):  # noqa: PERF203 - each file may be the one
            return file
    return None


def _has_pickles_only(folder: Path) -> bool:
    return any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("model*.safetensors"))


def _pickled(name: str, auto: str) -> UserError:
    folder = name if os.path.isdir(name) else name.replace("/", "-")
    return UserError(
        "the weights are pickled (pytorch_model.bin), and a pickle can run code hidden in it. "
        "If you trust where they come from, write them once as safetensors: "
        f"python -c \"import transformers as t; [getattr(t, a).from_pretrained('{name}')"
        f".save_pretrained('{folder}') for a in ('{auto}', 'AutoTokenizer')]\" and give {folder}",
        name,
    )


def _deberta_v3_hint(found: ModelConfig) -> str:
    """Explain how to load DeBERTa-v3's own MLM head, whose layout transformers reads on request only."""
    if found.config.model_type == "deberta-v2" and found.config.legacy:
        return ', or, for a DeBERTa-v3 with its own MLM head, set "legacy": false in its config.json'
    return ""


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Silence transformers' table of missing weights and its progress bar: our message says it better."""
    verbosity = logging.get_verbosity()
    progress = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
