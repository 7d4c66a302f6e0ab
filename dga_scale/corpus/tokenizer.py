"""Load tokenizers without truncation, identify them by a hash, and apply them to many texts at a time."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dga_scale.errors import UserError
from dga_scale.storage.checked_json import read_object
from dga_scale.storage.hub import local_only

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing transformers costs 2 s and 200 MB, which a worker process need not pay
    from transformers import PreTrainedTokenizerBase

LONGEST_FRAGMENT = 1 << 18
"""The characters of a document that a tokenizer gets at once: longer documents are tokenised in fragments,
because a tokenizer needs many times the memory of its input."""

UNKNOWN_REFUSED = 0.5
"""The share of unknown tokens from which a text is refused."""

_NOT_IN_TEXT = "\ufdd0"
"""A code point that is no character, and that no cleaned text holds."""


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or a model name, with truncation and padding switched off.

    A tokenizer file can carry both (all-MiniLM-L6-v2's cuts at 128 tokens), and they would silently
    shorten every document.

    Raises:
        UserError: ``name_or_path`` holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    name = os.fspath(name_or_path)
    looks_like_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_path and not os.path.isdir(name):
        raise UserError("no such folder. Give a folder with tokenizer files, or a model's name", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=local_only(name)
        )
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, KeyError... here
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"its tokenizer can't be loaded: {reason}. Give a folder that holds tokenizer.json (or "
            "tokenizer_config.json and its vocabulary), or the name of a model",
            name,
        ) from error
    if not tokenizer.get_vocab().keys() - tokenizer.all_special_tokens:
        # What transformers makes of a model's folder without them: every text would be unknown.
        raise UserError(
            "no tokenizer files in it. Give a folder that holds tokenizer.json (or tokenizer_config.json and "
            "its vocabulary): tokenizer.save_pretrained writes them beside a model",
            name,
        )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of the tokenizer's special tokens among pad, mask, cls, sep, bos, eos and unk."""
    names = ("pad", "mask", "cls", "sep", "bos", "eos", "unk")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    return {name: int(index) for name, index in ids.items() if index is not None}


def unknown_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of what the tokenizer can't write; -1 where there is none, or it has another part too."""
    ids = special_ids(tokenizer)
    unknown = ids.pop("unk", -1)
    return -1 if unknown in ids.values() else unknown


def check_unknown(unknown: int, tokens: int, name: str, text: str) -> None:
    """Refuse a text of which most tokens are unknown.

    Args:
        unknown: The unknown tokens of the text.
        tokens: All its tokens.
        name: The tokenizer's folder or name.
        text: What the text is, in words.

    Raises:
        UserError: More than half of them are unknown.
    """
    if unknown > UNKNOWN_REFUSED * tokens:
        raise UserError(
            f"{unknown / tokens:.0%} of the tokens of {text} are unknown to the tokenizer of {name!r}: no "
            "model learns from these. Give a model whose vocabulary was made for this script or language"
        )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash what determines the ids of a text: normaliser, pre-tokeniser, model, added and special tokens.

    Truncation, padding, decoder and post-processor are left out, so the sha256 survives ``save_pretrained``
    and a change of ``model_max_length``.
    """
    content: dict[str, Any] = {"special": special_ids(tokenizer)}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("added_tokens", "normalizer", "pre_tokenizer", "model"):
            content[key] = backend[key]
    else:
        content["class"] = type(tokenizer).__name__
        content["vocab"] = tokenizer.get_vocab()
        processor = getattr(tokenizer, "sp_model", None)
        if processor is not None:
            content["sentencepiece"] = hashlib.sha256(processor.serialized_model_proto()).hexdigest()
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def positions_beside(name_or_path: str) -> int | None:
    """Return the positions of the model in a tokenizer's folder; None where it does not say, or none is."""
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        return None
    stated = read_object(path).get("max_position_embeddings")
    return stated if isinstance(stated, int) and stated > 0 else None


def markers(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """List the special tokens besides pad, mask, cls, sep, bos, eos and unk: ``<GENE>``, for example."""
    return [token for token in tokenizer.all_special_tokens if token not in _reserved(tokenizer)]


def _reserved(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    return {getattr(tokenizer, f"{name}_token") for name in special_ids(tokenizer)}


def encoder_spec(tokenizer: "PreTrainedTokenizerBase", name_or_path: str) -> str:
    """Describe a tokenizer for a worker that rebuilds it: the JSON of a fast one, the name of a slow one."""
    if not tokenizer.is_fast:
        return json.dumps({"slow": name_or_path})
    # A single character is text, whatever else it stands for: CLIP pads with "!".
    out_of_reach = {name: _NOT_IN_TEXT + name for name in _reserved(tokenizer) if len(name) > 1}
    return json.dumps(_renamed(json.loads(tokenizer.backend_tokenizer.to_str()), out_of_reach))


def _renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Rename tokens of a tokenizer, whose ids stay; special tokens that are not renamed become ordinary ones.

    Unigram, WordLevel and BPE models look for whole words in their vocabulary, the special ones among them:
    to switch off the search for special tokens does not hide these.
    """
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
        elif len(token["content"]) > 1:
            token["special"] = False
    spec["post_processor"] = None  # it frames rows, by the tokens' names
    return spec


class Encoder:
    """Turns texts into ids: no special tokens added, nothing truncated, nothing padded.

    The name of a special token that has a part of its own ("[MASK]", "</s>": ``special_ids``) is tokenised
    as plain text where it is written in a text; of a fast tokenizer, other special tokens (``markers``) are
    found there. Fast tokenizers run without transformers, which keeps a worker process small.
    """

    def __init__(self, spec: str) -> None:
        content = json.loads(spec)
        self._slow = load_tokenizer(content["slow"]) if "slow" in content else None
        if self._slow is None:
            self._fast = Tokenizer.from_str(spec)
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32, of any length (0 included)."""
        fragments = [
            (index, fragment)
            for index, text in enumerate(texts)
            for fragment in split_long(text, LONGEST_FRAGMENT)
        ]
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches(fragments):
            encoded = self._encode([fragment for _, fragment in batch])
            for (index, _), fragment_ids in zip(batch, encoded, strict=True):
                ids[index].append(np.array(fragment_ids, dtype=np.int32))
        return [found[0] if len(found) == 1 else np.concatenate(found) for found in ids]

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        if self._slow is None:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return (encoding.ids for encoding in encodings)
        return iter(
            self._slow(
                texts,
                add_special_tokens=False,
                split_special_tokens=True,
                truncation=False,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        )


def _batches(fragments: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Group neighbouring fragments into batches of about ``LONGEST_FRAGMENT`` characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for index, fragment in fragments:
        batch.append((index, fragment))
        size += len(fragment)
        if size >= LONGEST_FRAGMENT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def cached_encoder(spec: str) -> Encoder:
    """Build the encoder of ``spec``, once in a process."""
    return Encoder(spec)


def split_long(text: str, limit: int) -> list[str]:
    """Cut ``text`` into fragments of at most ``limit`` characters, before a line break or space if possible.

    Whitespace bounds the words of nearly every tokenizer, so the ids are those of the whole text (give or
    take one per cut where a tokenizer treats the start of a text apart).
    """
    fragments = []
    start = 0
    while len(text) - start > limit:
        cut = max(text.rfind("\n", start + 1, start + limit), text.rfind(" ", start + 1, start + limit))
        if cut <= start:
            cut = start + limit
        fragments.append(text[start:cut])
        start = cut
    fragments.append(text[start:])
    return fragments
