"""Write a model's folder whose tokenizer and embeddings have further tokens."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig

from dga_scale.backbone.loading import check_vocabulary
from dga_scale.errors import UserError
from dga_scale.merging.folders import ModelFolder, StoredTensor
from dga_scale.run_folder import new_folder, write_text
from dga_scale.storage.safetensors_stream import Entry, write_model_files
from dga_scale.vocabulary.terms import Term
from dga_scale.vocabulary.tokens import AddedTerm, add_terms

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", ".*")
_MOST_PADDING = 128
"""The largest multiple to which sizes of vocabularies are padded."""


@dataclass(frozen=True)
class Extended:
    """What was written."""

    added: tuple[AddedTerm, ...]
    left_out: tuple[Term, ...]
    """The terms that were one token already."""
    tokens: int
    """All tokens of the tokenizer."""
    rows: int
    """The rows of the embeddings, filler rows included."""


def extend(model: ModelFolder, terms: Sequence[Term], output: Path) -> Extended:
    """Write a model's folder with ``terms`` as tokens, whole or not at all.

    Each row of a new token, in the embeddings, the LM head and its bias, is the mean of the rows of the
    tokens that the term had been (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models",
    2021, takes all tokens' mean; the pieces' is nearer). All other rows and weights stay bit for bit.

    Raises:
        UserError: A term is a special token's name, or none of them is new; the tokenizer has no way to take
            terms, or more tokens than the model has rows; the model is extended by parts of ours; ``output``
            exists already, or the disk is full.
    """
    if model.settings.extended:
        raise UserError(
            "it has parts of its own (adapters, experts or soft tokens). Extend the vocabulary of the model "
            "that they were added to, and train them again",
            model.name,
        )
    check_vocabulary(model.settings, model.tokenizer)
    tokenizer, added, left_out = add_terms(model.name, terms)
    before, needed = model.settings.config.vocab_size, max(each.id for each in added) + 1
    rows = _rows(before, len(model.tokenizer), needed)
    with new_folder(output) as folder:
        # symlinks=False: the hub's cache holds links. Vocabularies of other formats would lack the terms.
        stale = (*_WEIGHTS, *tokenizer.vocab_files_names.values())
        shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns(*stale))
        tokenizer.save_pretrained(folder)
        sized = _vocabulary_tensors(model)
        write_model_files(
            folder,
            [
                _extended(stored, rows, added) if name in sized else _copied(stored)
                for name, stored in model.tensors.items()
            ],
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"vocab_size": rows}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return Extended(added, left_out, len(tokenizer), rows)


def _rows(before: int, tokens: int, needed: int) -> int:
    """Return the size of the new embeddings, padded as the old ones are where these have filler rows."""
    multiple = min(before & -before, _MOST_PADDING) if before > tokens else 1
    return max(before, -(-needed // multiple) * multiple)


def _vocabulary_tensors(model: ModelFolder) -> set[str]:
    """Return the names, with and without the trunk's, of the tensors that have a row for each token.

    They are those whose shape changes with the size of the vocabulary, whatever the architecture calls them.
    """
    config = model.settings.config
    larger = copy.deepcopy(config)
    larger.vocab_size += 1
    shapes, others = (_shapes(each, model.settings.causal) for each in (config, larger))
    sized = {name for name, shape in shapes.items() if others[name] != shape}
    return sized | {name.partition(".")[2] for name in sized}


def _shapes(config: PretrainedConfig, causal: bool) -> dict[str, torch.Size]:
    auto: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in auto.from_config(config).state_dict().items()}


def _copied(stored: StoredTensor) -> Entry:
    return Entry(stored.name, stored.dtype, stored.shape, lambda: ModelFolder.read(stored))


def _extended(stored: StoredTensor, rows: int, added: Sequence[AddedTerm]) -> Entry:
    def produce() -> Tensor:
        old = ModelFolder.read(stored)
        # Filler rows are like the last one, which is a filler where there are any.
        new = torch.cat([old, old[-1:].expand(rows - len(old), *old.shape[1:])])
        for each in added:
            new[each.id] = old[list(each.pieces)].float().mean(0).to(old.dtype)
        return new

    return Entry(stored.name, stored.dtype, (rows, *stored.shape[1:]), produce)
