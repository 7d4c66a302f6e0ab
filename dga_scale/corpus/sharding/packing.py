"""Second half of sharding: tokenise documents, pack them into rows and write them as one Arrow shard."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dga_scale.corpus.sharding.staging import (
    Work,
    duplicates_of,
    load_document_batches,
    read_document_batch,
    read_work,
)
from dga_scale.corpus.shards import VALIDATION, Shard, file_sha256
from dga_scale.corpus.tokenizer import Encoder, cached_encoder, unknown_id
from dga_scale.errors import UserError
from dga_scale.storage.atomic import atomic_file, write_json
from dga_scale.storage.typed_json import SignedInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKINGS = ("chunk", "document")

_ROWS_PER_WRITE = 4096
_ROWS_PER_BATCH = 1000
"""The largest number of rows in a record batch of a shard, as in ``datasets``."""


@dataclass(frozen=True)
class Layout:
    """The layout of a row."""

    packing: str
    sequence_length: int
    prefix: tuple[int, ...]
    """The special tokens before a row's content: CLS, or none for a causal tokenizer."""
    suffix: tuple[int, ...]
    """The special tokens after a row's content: SEP, or none."""
    separator: int
    """The token between documents in a chunk: SEP, or EOS, which also ends a causal document's row."""
    causal: bool
    special_ids: tuple[int, ...]
    unknown: SignedInt
    """The token for what the tokenizer can't write; -1: it has none, or rows are built with it."""
    vocab_size: int

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", name: str, packing: str, sequence_length: int
    ) -> "Layout":
        """The layout for a tokenizer: masked LM if it has a mask token, else causal.

        Raises:
            UserError: The tokenizer lacks the special tokens that rows need.
        """
        causal = tokenizer.mask_token_id is None
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if causal:
            first, last = None, tokenizer.eos_token_id
        if last is None or (first is None and not causal):
            needed = "an end-of-text token (eos)" if causal else "CLS and SEP (or bos and eos) tokens"
            raise UserError(f"the tokenizer of {name!r} has no {needed}, which rows are built with")
        return cls(
            packing=packing,
            sequence_length=sequence_length,
            prefix=() if causal else (first,),
            suffix=() if causal else (last,),
            separator=last,
            causal=causal,
            special_ids=tuple(sorted(tokenizer.all_special_ids)),
            unknown=unknown_id(tokenizer),
            vocab_size=len(tokenizer),
        )

    @property
    def content_length(self) -> int:
        """The number of ids in a full row without its special tokens."""
        return self.sequence_length - len(self.prefix) - len(self.suffix)


class Packer:
    """Packs the ids of documents into contents of rows (without CLS and SEP).

    "chunk": documents with a separator between them, cut every ``content_length`` ids; what is left at the
    end of the shard is a last, shorter row. "document": each document cut by itself, its last window shorter.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._separator = np.array([layout.separator], dtype=np.int32)
        self._pending: list[np.ndarray] = []  # chunk: what is not cut yet
        self._pending_length = 0
        self._started = False

    def add(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the contents of the rows that ``documents`` complete, each up to ``content_length`` ids."""
        if self._layout.packing == "document":
            rows = []
            for ids in documents:
                if len(ids):
                    ended = np.concatenate([ids, self._separator]) if self._layout.causal else ids
                    rows += self._windows(ended)
            return rows
        for ids in documents:
            if not len(ids):
                continue
            parts = [self._separator, ids] if self._started else [ids]
            self._started = True
            self._pending += parts
            self._pending_length += sum(map(len, parts))
        if self._pending_length < self._layout.content_length:
            return []
        *rows, rest = self._windows(np.concatenate(self._pending))
        self._pending, self._pending_length = [rest], len(rest)
        return rows

    def finish(self) -> list[np.ndarray]:
        """The last, shorter row, if anything is left."""
        return [np.concatenate(self._pending)] if self._pending_length else []

    def _windows(self, ids: np.ndarray) -> list[np.ndarray]:
        step = self._layout.content_length
        return [ids[start : start + step] for start in range(0, len(ids), step)]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the documents of ``document_batches`` that are in ``split`` and no duplicates."""

    split: str
    number: int
    document_batches: tuple[int, int]
    """The first document batch, and the one after the last."""
    threshold: int
    """The bound on the second half of a document's hash below which the document is held out."""
    partitions: int
    """The number of partitions that list the duplicates; 0: duplicates are kept."""


@dataclass(frozen=True)
class TokenizerFile:
    """What every process needs to tokenise and pack."""

    encoder: str
    """The description of the tokenizer, see ``encoder_spec``."""
    layout: Layout
    special_ids: dict[str, int]


def write_tokenizer_file(work: Work, encoder: str, layout: Layout, special_ids: dict[str, int]) -> None:
    """The settings that every process needs to tokenise and pack, beside the plan."""
    write_json(work.tokenizer_file, asdict(TokenizerFile(encoder, layout, special_ids)), work.scratch)


@lru_cache(maxsize=1)
def load_tokenizer_file(path: Path) -> tuple[str, Layout, dict[str, int]]:
    """The encoder's spec, the layout and the special ids, read once a process."""
    found = read_work(path, TokenizerFile)
    return found.encoder, found.layout, found.special_ids


def write_shard(folder: Path, task: ShardTask, threads: int) -> None:
    """Write a shard, then its record, which says that it is done. ``threads`` of them tokenise."""
    work = Work(folder)
    spec, layout, _ = load_tokenizer_file(work.tokenizer_file)
    encoder, packer = cached_encoder(spec), Packer(layout)
    writer_of_rows = _RowWriter(layout)
    path = work.shard_data(task.split, task.number)
    path.parent.mkdir(exist_ok=True)
    documents = 0
    with (
        atomic_file(path, work.scratch) as file,
        pa.ipc.new_stream(file, schema(layout.vocab_size)) as writer,
    ):
        for ids in _tokenised(_texts(work, task), encoder, threads):
            documents += len(ids)
            writer_of_rows.add(packer.add(ids), writer)
        writer_of_rows.add(packer.finish(), writer)
        writer_of_rows.flush(writer)
    shard = Shard(
        file=path.name,
        rows=writer_of_rows.rows,
        documents=documents,
        tokens=writer_of_rows.tokens,
        maskable=writer_of_rows.maskable,
        unknown=writer_of_rows.unknown,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )
    write_json(work.shard(task.split, task.number), asdict(shard), work.scratch)


def _texts(work: Work, task: ShardTask) -> Iterator[list[str]]:
    """The task's documents, a batch at a time."""
    document_batches = load_document_batches(work.document_batches_file)
    for index in range(*task.document_batches):
        repeats = duplicates_of(work, index, task.partitions)
        position = 0
        for texts, low in read_document_batch(work, document_batches[index].name):
            kept = low < np.uint64(task.threshold)
            if task.split != VALIDATION:
                kept = ~kept
            here = repeats[(repeats >= position) & (repeats < position + len(texts))] - np.uint64(position)
            kept[here.astype(np.int64)] = False
            yield texts.filter(pa.array(kept)).to_pylist()
            position += len(texts)


def _tokenised(batches: Iterator[list[str]], encoder: Encoder, threads: int) -> Iterator[list[np.ndarray]]:
    """Yield the ids of each batch, in order. Tokenizers release Python's lock: meanwhile the caller reads on,
    packs and writes.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[list[np.ndarray]]] = deque()
        try:
            for batch in batches:
                running.append(pool.submit(encoder, batch))
                if len(running) > threads + 1:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def features(vocab_size: int) -> dict[str, Any]:
    """Describe the columns of a shard for ``datasets``; ids have the smallest type that holds them."""
    ids, number = ({"dtype": str(dtype), "_type": "Value"} for dtype in (_id_type(vocab_size), "int32"))
    return {"input_ids": {"feature": ids, "_type": "List"}, "length": number, "maskable": number}


def schema(vocab_size: int) -> pa.Schema:
    """Return the schema of a shard, with the metadata by which ``datasets`` knows its columns."""
    ids = pa.list_(pa.from_numpy_dtype(_id_type(vocab_size)))
    columns = [("input_ids", ids), ("length", pa.int32()), ("maskable", pa.int32())]
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features(vocab_size)}})})


def _id_type(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class _RowWriter:
    """Adds CLS and SEP to the contents of rows, and writes them in record batches of one size."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._prefix, self._suffix = np.array(layout.prefix, np.int32), np.array(layout.suffix, np.int32)
        self._schema = schema(layout.vocab_size)
        self._dtype = _id_type(layout.vocab_size)
        self._ordinary = np.ones(layout.vocab_size, dtype=bool)
        self._ordinary[list(layout.special_ids)] = False
        self._waiting: list[np.ndarray] = []
        self.rows = self.tokens = self.maskable = self.unknown = 0

    def add(self, contents: list[np.ndarray], writer: Any) -> None:
        self._waiting += contents
        while len(self._waiting) >= _ROWS_PER_WRITE:
            self._write(self._waiting[:_ROWS_PER_WRITE], writer)
            self._waiting = self._waiting[_ROWS_PER_WRITE:]

    def flush(self, writer: Any) -> None:
        if self._waiting:
            self._write(self._waiting, writer)

    def _write(self, contents: list[np.ndarray], writer: Any) -> None:
        framed = [part for content in contents for part in (self._prefix, content, self._suffix)]
        values = np.concatenate(framed)
        lengths = np.array([len(content) for content in contents]) + len(self._prefix) + len(self._suffix)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ordinary = np.concatenate([[0], np.cumsum(self._ordinary[values])])
        maskable = ordinary[offsets[1:]] - ordinary[offsets[:-1]]
        ids = pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), pa.array(values.astype(self._dtype))
        )
        columns = [ids, pa.array(lengths.astype(np.int32)), pa.array(maskable.astype(np.int32))]
        writer.write_table(pa.table(columns, schema=self._schema), _ROWS_PER_BATCH)
        self.rows += len(contents)
        self.tokens += len(values)
        self.maskable += int(maskable.sum())
        self.unknown += int(np.count_nonzero(values == self._layout.unknown))
