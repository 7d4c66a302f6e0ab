"""The corpus on disk: Arrow shards beside a manifest.json, opened memory-mapped.

A corpus folder holds ``manifest.json``, ``data-00000.arrow`` ..., and the held-out part, itself a corpus, in
``validation/``. ``datasets.load_from_disk`` opens the same folder.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dga_scale.corpus.tokenizer import special_ids, tokenizer_hash
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import checked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of the folder's layout and of what the manifest says."""

MANIFEST = "manifest.json"
VALIDATION = "validation"
WORK_FOLDER = ".sharding"
"""Unfinished work of the sharder, inside the corpus folder until the manifest is written."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file: columns ``input_ids`` (list of uint16 or int32), ``length``, ``maskable`` (int32)."""

    file: str
    rows: int
    documents: int
    tokens: int
    """Ids in all rows, special ones included."""
    maskable: int
    """Ids that are not special."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds and how it was made."""

    format: int
    split: str
    """"train" or "validation"."""
    sequence_length: int
    """Longest row, in ids."""
    packing: str
    """"chunk": documents concatenated and cut; "document": a row is a document or a window of one."""
    causal: bool
    """True where the tokenizer has no mask token: rows without CLS and SEP, documents end with EOS."""
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    special_ids: dict[str, int]
    """Ids of pad, mask, cls, sep, bos, eos, unk, as far as the tokenizer has them."""
    all_special_ids: tuple[int, ...]
    rows: int
    documents: int
    tokens: int
    maskable: int
    documents_read: int
    """In all inputs, before anything was dropped or held out; the same number in both splits."""
    dropped: dict[str, int]
    """Of ``documents_read``: "empty", "control_only", "duplicates", and "excluded" where files were given."""
    settings: dict[str, Any]
    """Every setting that decides the shards' bytes."""
    sources: tuple[dict[str, Any], ...]
    """Path, bytes and fingerprint of each input file, in the order read."""
    shards: tuple[Shard, ...]
    excluded: tuple[dict[str, Any], ...] = ()
    """Files of examples that no document overlaps with: path, sha256, examples, and how many were found."""

    @property
    def content_length(self) -> int:
        """Longest row without its CLS and SEP."""
        return self.sequence_length if self.causal else self.sequence_length - 2

    @property
    def content_hash(self) -> str:
        """Identity of the rows: sha256 over the shards' hashes and the tokenizer's."""
        parts = [self.tokenizer_hash, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data, the content of manifest.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """The inverse of ``to_json``."""
        return cls(
            **{
                **content,
                "all_special_ids": tuple(content["all_special_ids"]),
                "sources": tuple(content["sources"]),
                "shards": tuple(Shard(**shard) for shard in content["shards"]),
                "excluded": tuple(content["excluded"]),
            }
        )


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder``'s manifest.

    Raises:
        UserError: no such folder, no corpus in it, unfinished, damaged, or of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"corpus {folder}: no such folder. Make one with tools/shard_corpus.py --output {folder}"
        )
    if not path.is_file():
        if (folder / WORK_FOLDER).is_dir():
            raise UserError(
                f"corpus {folder} is unfinished (it has no {MANIFEST} yet): run the same "
                "tools/shard_corpus.py command again, it continues where it stopped"
            )
        raise UserError(
            f"{folder} holds no corpus ({MANIFEST} is missing). Pass a folder that shard_corpus.py wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version != FORMAT:
            raise UserError(
                f"{path}: corpus format {version}, this version reads {FORMAT}. Shard the text again"
            )
        return Manifest.from_json(checked(content))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Shard the text again into an empty folder") from error


class _OpenShard:
    """Numpy views of one memory-mapped shard; a row is a slice of its record batch's values."""

    def __init__(self, path: Path) -> None:
        # As ``datasets`` opens a shard, whose import alone would cost each rank half a second.
        import pyarrow

        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            table = stream.read_all()
        self._values: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        for chunk in table.column("input_ids").chunks:
            self._values.append(np.from_dlpack(chunk.values))  # to_numpy() would import pandas
            self._offsets.append(np.from_dlpack(chunk.offsets))
        self._starts = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])
        self.lengths, self.maskable = (
            np.concatenate([np.empty(0, np.int32), *map(np.from_dlpack, table.column(name).chunks)])
            for name in ("length", "maskable")
        )

    def row(self, index: int) -> np.ndarray:
        """Ids of row ``index``, a view of the file."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, local = self._offsets[chunk], index - self._starts[chunk]
        return self._values[chunk][offsets[local] : offsets[local + 1]]


class Corpus:
    """Rows of token ids, memory-mapped: opening costs nothing, reading a row costs a copy of it.

    Example::

        corpus = Corpus.open("corpora/acl")
        corpus.row(0)                                   # int32 ids, special tokens included
        held_out = Corpus.open("corpora/acl/validation")
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.shards])
        self._open: dict[int, _OpenShard] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: str = "size") -> "Corpus":
        """Open the corpus in folder ``path``.

        Args:
            path: A folder that tools/shard_corpus.py wrote, or its ``validation`` folder.
            verify: "size" compares each shard's size with the manifest's; "sha256" reads every byte as well.

        Raises:
            UserError: no corpus there, or a shard that is missing, truncated or (sha256) changed.
        """
        assert verify in ("size", "sha256"), verify
        folder = Path(path)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            _check_shard(folder / shard.file, shard, whole=verify == "sha256")
        return cls(folder, manifest)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every byte of this part's shards (each ``parts``-th) and compare their hashes.

        Raises:
            UserError: a shard that was changed.
        """
        for shard in self.manifest.shards[part::parts]:
            _check_shard(self.path / shard.file, shard, whole=True)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> np.ndarray:
        """Ids of one row: (length,) int32."""
        assert 0 <= index < len(self), f"row {index} of {len(self)}"
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shard(shard).row(index - int(self._starts[shard])).astype(np.int32)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Ids of several rows, in the order asked for."""
        return [self.row(int(index)) for index in indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Ids in each row: (rows,) int32."""
        return self._column("lengths")

    @cached_property
    def maskable(self) -> np.ndarray:
        """Ids of each row that are not special tokens: (rows,) int32."""
        return self._column("maskable")

    @property
    def content_hash(self) -> str:
        """Identity of the rows: sha256 over the shards' hashes and the tokenizer's."""
        return self.manifest.content_hash

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = _OpenShard(self.path / self.manifest.shards[number].file)
        return self._open[number]

    def _column(self, name: str) -> np.ndarray:
        columns = [getattr(self._shard(number), name) for number in range(len(self.manifest.shards))]
        return np.concatenate([np.empty(0, np.int32), *columns])


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_shard(path: Path, shard: Shard, whole: bool) -> None:
    advice = "Copy it again from where it was made, or shard the text again"
    if not path.is_file():
        raise UserError(f"shard {path} is missing. {advice}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"shard {path} has {size} bytes, its manifest says {shard.bytes}. {advice}")
    if whole and (found := file_sha256(path)) != shard.sha256:
        raise UserError(
            f"shard {path} was changed: its sha256 is {found}, its manifest says {shard.sha256}. {advice}"
        )


def check_matches(manifest: Manifest, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a corpus that another tokenizer made than the model's.

    Raises:
        UserError: vocabulary, special tokens or any rule of tokenisation differ.
    """
    advice = (
        f"The corpus was made with the tokenizer of {manifest.tokenizer!r}: shard the text again with "
        "--tokenizer set to the model, or train the model the corpus was made for"
    )
    if len(tokenizer) != manifest.vocab_size:
        raise UserError(
            f"corpus and model do not match: the corpus has a vocabulary of {manifest.vocab_size}, the "
            f"model's tokenizer one of {len(tokenizer)}. {advice}"
        )
    found = special_ids(tokenizer)
    if found != manifest.special_ids:
        raise UserError(
            f"corpus and model do not match: the corpus has special tokens {manifest.special_ids}, the "
            f"model's tokenizer {found}. {advice}"
        )
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            "corpus and model do not match: the two tokenizers have vocabularies of one size but tokenise "
            f"differently (their hashes differ). {advice}"
        )


def check_sequence_length(manifest: Manifest, max_positions: int) -> None:
    """Refuse a corpus whose rows are longer than the model's positions.

    Raises:
        UserError: ``manifest.sequence_length > max_positions``.
    """
    if manifest.sequence_length > max_positions:
        raise UserError(
            f"the corpus has rows of {manifest.sequence_length} tokens, the model takes at most "
            f"{max_positions}. Shard the text again with --sequence_length {max_positions} or less"
        )
