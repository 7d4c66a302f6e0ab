"""The corpus on disk: Arrow shards beside a manifest.json, memory-mapped.

A corpus folder holds ``manifest.json``, ``data-00000.arrow`` ..., and the held-out part, itself a corpus, in
``validation/``. ``datasets.load_from_disk`` opens the same folder.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dga_scale.config.declaration import shown
from dga_scale.corpus.tokenizer import special_ids, tokenizer_hash
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import checked, load_object
from dga_scale.storage.typed_json import FileName, SignedInt, build

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
"""The version of the folder's layout and of the manifest's content."""

MANIFEST = "manifest.json"
VALIDATION = "validation"
WORK_FOLDER = ".sharding"
"""The folder of the sharder's unfinished work, inside the corpus folder until the manifest is written."""

_ADVICE = "Copy it again from where it was made, or shard the text again"


@dataclass(frozen=True)
class Shard:
    """One Arrow file: columns ``input_ids`` (list of uint16 or int32), ``length``, ``maskable`` (int32)."""

    file: FileName
    rows: int
    documents: int
    tokens: int
    """The number of ids in all rows, special ones included."""
    maskable: int
    """The number of ids that are not special."""
    unknown: int
    """The number of ids of what the tokenizer can't write."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReadSource:
    """An input that was read: a ``reading.files.Source``, and the sha256 of its content."""

    path: str
    format: str
    compression: str | None
    bytes: int
    fingerprint: str
    modified: SignedInt
    sha256: str


@dataclass(frozen=True)
class ExcludedFile:
    """A file of examples whose documents were dropped, and how many of the examples stood in the text."""

    path: str
    sha256: str
    examples: int
    found: int


@dataclass(frozen=True)
class Manifest:
    """The content of a corpus, and how it was made."""

    format: int
    split: str
    """The split: "train" or "validation"."""
    sequence_length: int
    """The length of the longest possible row, in ids."""
    packing: str
    """The packing: "chunk" concatenates and cuts documents; "document" makes rows of one document each."""
    causal: bool
    """Whether the tokenizer has no mask token: rows have no CLS and SEP then, and documents end with EOS."""
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    special_ids: dict[str, int]
    """The ids of pad, mask, cls, sep, bos, eos and unk, as far as the tokenizer has them."""
    all_special_ids: tuple[int, ...]
    rows: int
    documents: int
    tokens: int
    maskable: int
    unknown: int
    documents_read: int
    """The documents in all inputs, before any was dropped or held out; the same number in both splits."""
    dropped: dict[str, int]
    """The numbers of dropped documents: "empty", "control_only", "duplicates", "excluded" (if requested),
    "bad" (records that could not be read, if there were any)."""
    settings: dict[str, Any]
    """Every setting that determines the shards' bytes."""
    sources: tuple[ReadSource, ...]
    """The inputs, in the order read."""
    shards: tuple[Shard, ...]
    excluded: tuple[ExcludedFile, ...] = ()

    @property
    def content_length(self) -> int:
        """The length of the longest possible row without its CLS and SEP, in ids."""
        return self.sequence_length if self.causal else self.sequence_length - 2

    @property
    def content_hash(self) -> str:
        """The identity of the rows: sha256 over the tokenizer's hash and the shards' hashes."""
        hashes = [self.tokenizer_hash, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain data, the content of manifest.json."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """See that the shards add up to the whole, and that lengths and ids are possible.

        Raises:
            ValueError: They do not, or are not.
        """
        for name in ("rows", "documents", "tokens", "maskable", "unknown"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if getattr(self, name) != total:
                raise ValueError(f"{name} is {getattr(self, name)}, and its shards have {total}")
        if self.content_length < 1:
            raise ValueError(f"sequence_length is {self.sequence_length}, and leaves no room for text")
        if max([*self.special_ids.values(), *self.all_special_ids], default=0) >= self.vocab_size:
            raise ValueError(f"vocab_size is {self.vocab_size}, and a special token's id is not below")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the corpus in ``folder``.

    Raises:
        UserError: The folder does not exist or holds no corpus, or the corpus is unfinished, damaged or of
            another version.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise UserError(
            f"a file, not a corpus. Shard text first: tools/shard_corpus.py {folder} --tokenizer MODEL "
            "--output DIR, then give DIR",
            folder,
        )
    if not folder.is_dir():
        raise UserError(
            "no such folder. Give one that tools/shard_corpus.py wrote, or write it with that", folder
        )
    if not path.is_file():
        if (folder / WORK_FOLDER).is_dir():
            raise UserError(
                f"an unfinished corpus (it has no {MANIFEST} yet). Run the same command of "
                "tools/shard_corpus.py again, it continues where it stopped",
                folder,
            )
        raise UserError(
            f"no corpus in it ({MANIFEST} is missing). Give a folder that tools/shard_corpus.py wrote", folder
        )
    try:
        content = load_object(path)
        if content.get("format") != FORMAT:
            raise UserError(
                f"corpus format {shown(content.get('format'))}, this version reads {FORMAT}. Shard the text "
                "again",
                path,
            )
        manifest: Manifest = build(Manifest, checked(content))
        manifest.check()
        return manifest
    except (OSError, ValueError) as error:
        raise UserError(f"damaged ({error}). Shard the text again into an empty folder", path) from error


class _OpenShard:
    """Numpy views of one memory-mapped shard; a row is a slice of its record batch's values."""

    def __init__(self, path: Path, shard: Shard) -> None:
        # Done as in ``datasets``, whose import alone would cost each rank half a second.
        import pyarrow

        try:
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                table = stream.read_all()
            chunks = table.column("input_ids").chunks
            self._values = [np.from_dlpack(chunk.values) for chunk in chunks]  # to_numpy() imports pandas
            self._offsets = [np.from_dlpack(chunk.offsets) for chunk in chunks]
            self.lengths, self.maskable = (
                np.concatenate([np.empty(0, np.int32), *map(np.from_dlpack, table.column(name).chunks)])
                for name in ("length", "maskable")
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:  # what pyarrow raises is among them
            raise UserError(f"no shard of a corpus ({error}). {_ADVICE}", path) from error
        self._starts = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])
        held = {"rows": int(self._starts[-1]), "tokens": int(self.lengths.sum())}
        for name, count in (held | {"maskable": int(self.maskable.sum())}).items():
            if count != getattr(shard, name):
                raise UserError(
                    f"its {name} are {count}, and {getattr(shard, name)} in {MANIFEST}. {_ADVICE}", path
                )

    def row(self, index: int) -> np.ndarray:
        """Return the ids of row ``index``, a view of the file."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, local = self._offsets[chunk], index - self._starts[chunk]
        return self._values[chunk][offsets[local] : offsets[local + 1]]


class Corpus:
    """The memory-mapped rows of token ids: opening reads no rows, and reading a row copies it.

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
            UserError: No corpus there, or a shard that is missing, truncated or (sha256) changed.
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
            UserError: A shard that was changed.
        """
        for shard in self.manifest.shards[part::parts]:
            _check_shard(self.path / shard.file, shard, whole=True)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> np.ndarray:
        """Return the ids of one row: (length,) int32."""
        assert 0 <= index < len(self), f"row {index} of {len(self)}"
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shard(shard).row(index - int(self._starts[shard])).astype(np.int32)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the ids of several rows, in the order of ``indices``."""
        return [self.row(int(index)) for index in indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of ids in each row: (rows,) int32."""
        return self._column("lengths")

    @cached_property
    def maskable(self) -> np.ndarray:
        """The number of ids in each row that are not special tokens: (rows,) int32."""
        return self._column("maskable")

    @property
    def content_hash(self) -> str:
        """The identity of the rows: sha256 over the tokenizer's hash and the shards' hashes."""
        return self.manifest.content_hash

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            shard = self.manifest.shards[number]
            self._open[number] = _OpenShard(self.path / shard.file, shard)
        return self._open[number]

    def _column(self, name: str) -> np.ndarray:
        columns = [getattr(self._shard(number), name) for number in range(len(self.manifest.shards))]
        return np.concatenate([np.empty(0, np.int32), *columns])


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_shard(path: Path, shard: Shard, whole: bool) -> None:
    if not path.is_file():
        raise UserError(f"no such shard. {_ADVICE}", path)
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"a shard of {size} bytes, the manifest says {shard.bytes}. {_ADVICE}", path)
    if whole and (found := file_sha256(path)) != shard.sha256:
        raise UserError(
            f"the shard was changed: its sha256 is {found}, the manifest says {shard.sha256}. {_ADVICE}", path
        )


def open_corpus(path: str | os.PathLike[str], tokenizer: "PreTrainedTokenizerBase") -> Corpus:
    """Open a corpus for a model with this tokenizer.

    Raises:
        UserError: No corpus there, one of another tokenizer, or one without a token to predict.
    """
    corpus = Corpus.open(path)
    if not corpus.manifest.maskable:
        raise UserError(
            "none of its tokens can be predicted: all are special or unknown. Shard other text", corpus.path
        )
    check_matches(corpus, tokenizer)
    return corpus


def check_matches(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a corpus that was made with another tokenizer than the model's.

    Raises:
        UserError: The vocabulary, the special tokens or any rule of tokenisation differ.
    """
    manifest = corpus.manifest
    if len(tokenizer) != manifest.vocab_size:
        differ = f"a vocabulary of {manifest.vocab_size}, the model's tokenizer one of {len(tokenizer)}"
    elif (found := special_ids(tokenizer)) != manifest.special_ids:
        differ = f"special tokens {manifest.special_ids}, the model's tokenizer {found}"
    elif tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        differ = "a vocabulary of the same size as the model's tokenizer, but is tokenised differently"
    else:
        return
    raise UserError(
        f"does not match the model: it has {differ}. It was made with the tokenizer of "
        f"{manifest.tokenizer!r}: shard the text again with --tokenizer set to the model, or train the model "
        "that it was made for",
        corpus.path,
    )


def check_sequence_length(corpus: Corpus, max_positions: int) -> None:
    """Refuse a corpus whose rows are longer than the model's positions.

    Raises:
        UserError: ``corpus.manifest.sequence_length > max_positions``.
    """
    if corpus.manifest.sequence_length > max_positions:
        raise UserError(
            f"it has rows of {corpus.manifest.sequence_length} tokens, the model takes at most "
            f"{max_positions}. Shard the text again with --sequence_length {max_positions} or less",
            corpus.path,
        )
