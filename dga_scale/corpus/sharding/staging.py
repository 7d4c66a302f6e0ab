"""First half of sharding: documents read, cleaned, hashed and staged; duplicates found.

Documents are staged in document batches of bounded size, so that everything after depends neither on the
input's format nor on its compression. A document batch and its list of hashes are cut by the text alone,
never by the number of processes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from dga_scale.corpus.reading.cleaning import clean
from dga_scale.corpus.reading.files import Segment, Source, files_of
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.overlap import load_overlap
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment, segments
from dga_scale.corpus.shards import VALIDATION, file_sha256
from dga_scale.errors import UserError
from dga_scale.storage.atomic import atomic_file, write_array, write_json
from dga_scale.storage.typed_json import FileName, read_typed

T = TypeVar("T")

BATCH_DOCUMENTS = 1 << 18
"""A document batch ends after so many documents even where they are short: its hashes are held in memory."""

PARTITION_HASHES = 1 << 17
"""The number of hashes compared at once in the search for duplicates, which takes about 15 MB of memory."""

_RECORD_BATCH_BYTES = 1 << 18
"""Bytes of text in a record batch, which is tokenised at once: a tokenizer needs many times that memory."""

_SCHEMA = pa.schema([("text", pa.large_string()), ("low", pa.uint64())])


@dataclass(frozen=True)
class ShardSettings:
    """The settings that determine the bytes of a corpus, besides its inputs."""

    tokenizer: str
    sequence_length: int = 164
    packing: str = "chunk"
    text_field: str = "text"
    document: str = "line"
    validation_share: float = 0.005
    keep_duplicates: bool = False
    shard_size: float = 16.0
    """The megabytes of text in a shard."""
    seed: int = 0
    tokenizer_hash: str = ""
    """Filled in by ``shard_corpus``."""
    exclude: tuple[str, ...] = ()
    """The files of end-task examples: documents that share an 8-gram of words with one are dropped."""
    exclude_hash: str = ""
    """Filled in by ``shard_corpus``."""
    on_bad_record: str = "stop"
    """What a record that can't be read does: "stop", or "skip": it is left out and counted."""
    max_document_mb: float = 256.0
    """The largest size of a document, in megabytes: a larger one is a bad record."""

    @property
    def shard_bytes(self) -> int:
        """The value of ``shard_size`` in bytes."""
        return int(self.shard_size * 1e6)

    @property
    def read_options(self) -> ReadOptions:
        """The settings for reading the sources."""
        return ReadOptions(
            text_field=self.text_field,
            whole_files=self.document == "file",
            skip_bad=self.on_bad_record == "skip",
            max_bytes=int(self.max_document_mb * 1e6),
        )


@dataclass(frozen=True)
class Plan:
    """The whole work, decided before it begins: settings, sources and input splits."""

    settings: ShardSettings
    sources: tuple[Source, ...]
    input_splits: tuple[tuple[Segment, ...], ...]

    @classmethod
    def make(cls, inputs: Sequence[str], settings: ShardSettings) -> "Plan":
        """Find the sources and cut them into input splits of about four shards each."""
        sources = find_sources(inputs)
        target = 4 * settings.shard_bytes
        input_splits: list[tuple[Segment, ...]] = []
        input_split: list[Segment] = []
        weight = 0
        for number, source in enumerate(sources):
            for segment in segments(number, source, settings.read_options, target):
                if input_split and weight + segment.weight > target:
                    input_splits.append(tuple(input_split))
                    input_split, weight = [], 0
                input_split.append(segment)
                weight += segment.weight
        input_splits.append(tuple(input_split))
        return cls(settings, tuple(sources), tuple(input_splits))

    @cached_property
    def keys(self) -> list[str]:
        """The identity of each input split: a hash of what is read, and of all that decides what comes of it.

        It does not depend on where the sources lie, so that work is found again under another plan.
        """
        settings = self.settings
        reading = [
            asdict(settings.read_options),
            [settings.shard_bytes, settings.keep_duplicates, settings.seed, settings.exclude_hash],
        ]
        keys = []
        for input_split in self.input_splits:
            found = [
                [{**asdict(self.sources[segment.source]), "path": ""}, segment.start, segment.stop]
                for segment in input_split
            ]
            keys.append(hashlib.sha256(json.dumps([reading, found]).encode()).hexdigest()[:16])
        return keys

    @property
    def name(self) -> str:
        """A hash of the work, by which its array tasks know each other: the same text to the same corpus."""
        decisive = asdict(self.settings) | {"tokenizer": "", "exclude": ""}  # their hashes tell
        return hashlib.sha256(json.dumps([self.keys, decisive]).encode()).hexdigest()[:16]

    def to_json(self) -> dict:
        """Return plain data, the content of plan.json."""
        return json.loads(json.dumps(asdict(self)))


class Work:
    """The paths of the unfinished work: all in one folder inside the corpus folder, removed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder.parent
        self.scratch = folder / "scratch"
        self.plan_file = folder / "plan.json"
        self.tokenizer_file = folder / "tokenizer.json"
        self.document_batches_file = folder / "document_batches.json"
        self.report_file = folder / "report.json"

    def input_split(self, key: str) -> Path:
        """Return the path of the report that is written when an input split has been read."""
        return self.folder / f"input-{key}.json"

    def document_batch(self, name: str) -> Path:
        """Return the path of the documents of a document batch."""
        return self.folder / f"documents-{name}.arrow"

    def hashes(self, name: str) -> Path:
        """Return the path of the hashes of a document batch."""
        return self.folder / f"documents-{name}.npy"

    def remove_later_stages(self) -> None:
        """Remove all that comes after reading: it depends on all input splits and settings."""
        for pattern in ("document_batches.json", "report.json", "duplicates-*", "train-*", f"{VALIDATION}-*"):
            for path in self.folder.glob(pattern):
                path.unlink()
        for folder in (self.output, self.output / VALIDATION):
            for path in folder.glob("data-*.arrow"):
                path.unlink()

    def duplicates(self, number: int) -> Path:
        """Return the path of the duplicates in a partition of the hashes."""
        return self.folder / f"duplicates-{number:05d}.npy"

    def shard(self, split: str, number: int) -> Path:
        """Return the path of the record of a finished shard."""
        return self.folder / f"{split}-{number:05d}.json"

    def shard_data(self, split: str, number: int) -> Path:
        """A finished shard, in its final place."""
        folder = self.output / VALIDATION if split == VALIDATION else self.output
        return folder / f"data-{number:05d}.arrow"


def read_work(path: Path, kind: type[T]) -> T:
    """Read a file of unfinished work.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It is damaged, or another version's.
    """
    path.stat()  # another array task may have ended and removed it
    return read_typed(path, kind, f"Remove {path.parent}, and run the same command again")


def read_plan(path: Path) -> Plan:
    """Read the plan of unfinished work.

    Raises:
        UserError: As ``read_work``.
    """
    plan = read_work(path, Plan)
    if not all(segment.source < len(plan.sources) for each in plan.input_splits for segment in each):
        raise _damaged(path, "it names more sources than it has")
    return plan


@lru_cache(maxsize=1)
def load_plan(path: Path) -> Plan:
    """The plan, read once a process."""
    return read_plan(path)


@dataclass(frozen=True)
class DocumentBatch:
    """The documents of one staging file, in the order of the input."""

    name: FileName
    documents: int
    bytes: int
    lowest: int
    """The smallest second half of the documents' hashes."""


@lru_cache(maxsize=1)
def load_document_batches(path: Path) -> tuple[DocumentBatch, ...]:
    """Read all document batches in the order of the input, once in a process."""
    return tuple(read_work(path, list[DocumentBatch]))


@dataclass
class InputSplitReport:
    """The counts of one input split that was read."""

    documents_read: int = 0
    empty: int = 0
    control_only: int = 0
    duplicates: int = 0
    """The duplicates within a document batch; others are found when all document batches exist."""
    excluded: int = 0
    bad: int = 0


@dataclass(frozen=True)
class InputSplitResult:
    """What became of one input split: the record that it was read."""

    report: InputSplitReport
    document_batches: list[DocumentBatch]
    examples_found: list[int]
    """The numbers of the excluded examples that stand in the documents."""
    first_bad: str
    """The first bad record that was left out; empty where there was none."""
    sha256: list[str]
    """The hashes of the sources that begin in the input split."""


def document_hash(text: bytes, seed: int) -> bytes:
    """16 bytes: the first half finds duplicates, the second decides the split. Other seeds, other splits."""
    return hashlib.blake2b(text, digest_size=16, salt=seed.to_bytes(16, "little")).digest()


def read_input_split(folder: Path, number: int) -> None:
    """Read input split ``number``: write its document batches, then the report that says it is done."""
    work = Work(folder)
    plan = load_plan(work.plan_file)
    report, records = InputSplitReport(), Records()
    found: set[int] = set()
    documents = _documents(plan, number, report, records, found)
    document_batches: list[DocumentBatch] = []
    while (first := next(documents, None)) is not None:
        name = f"{plan.keys[number]}-{len(document_batches):04d}"
        document_batches.append(
            _write_document_batch(work, name, chain([first], documents), plan.settings, report)
        )
    report.documents_read += records.bad
    report.bad = records.bad
    begun = [plan.sources[segment.source] for segment in plan.input_splits[number] if not segment.start]
    content = InputSplitResult(
        report, document_batches, sorted(found), records.first_bad, [content_hash(source) for source in begun]
    )
    for index in {segment.source for segment in plan.input_splits[number]}:
        plan.sources[index].check_unchanged()
    write_json(work.input_split(plan.keys[number]), asdict(content), work.scratch)


def content_hash(source: Source) -> str:
    """Return the sha256 of a source's content: of a folder, of its files' names and hashes."""
    path = Path(source.path)
    if not path.is_dir():
        return file_sha256(path)
    hashes = [f"{file_sha256(file)} {file.name}\n" for file in files_of(path)]
    return hashlib.sha256(os.fsencode("".join(hashes))).hexdigest()


def _documents(
    plan: Plan, number: int, report: InputSplitReport, records: Records, found: set[int]
) -> Iterator[str]:
    """Yield the cleaned documents of an input split; empty and excluded ones are counted and left out.

    Numbers of the excluded examples that stand in the documents are added to ``found``.
    """
    overlap = load_overlap(tuple(plan.settings.exclude)) if plan.settings.exclude else None
    for segment in plan.input_splits[number]:
        for raw in read_segment(plan.sources[segment.source], segment, plan.settings.read_options, records):
            report.documents_read += 1
            text = clean(raw)
            if text and overlap is not None and len(examples := overlap.find(text)):
                report.excluded += 1
                found.update(examples.tolist())
            elif text:
                yield text
            elif raw.strip():
                report.control_only += 1
            else:
                report.empty += 1


def _write_document_batch(
    work: Work, name: str, documents: Iterator[str], settings: ShardSettings, report: InputSplitReport
) -> DocumentBatch:
    """Take documents until the document batch is full; duplicates are counted and left out."""
    hashes: list[bytes] = []
    seen: set[bytes] = set()
    size = 0
    with atomic_file(work.document_batch(name), work.scratch) as file:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_stream(file, _SCHEMA, options=options) as writer:
            batch: list[bytes] = []
            batch_bytes = 0
            for document in documents:
                text = document.encode()
                digest = document_hash(text, settings.seed)
                if not settings.keep_duplicates:
                    if digest in seen:
                        report.duplicates += 1
                        continue
                    seen.add(digest)
                hashes.append(digest)
                batch.append(text)
                batch_bytes += len(text)
                full = size + batch_bytes >= settings.shard_bytes or len(hashes) >= BATCH_DOCUMENTS
                if full or batch_bytes >= _RECORD_BATCH_BYTES:
                    writer.write_batch(_record_batch(batch, hashes[-len(batch) :]))
                    size += batch_bytes
                    batch, batch_bytes = [], 0
                if full:
                    break
            if batch:
                writer.write_batch(_record_batch(batch, hashes[-len(batch) :]))
                size += batch_bytes
    pairs = _pairs(hashes)
    if not settings.keep_duplicates:
        order = np.lexsort((pairs[1], pairs[0]))
        write_array(work.hashes(name), np.stack([*pairs[:, order], order.astype(np.uint64)]), work.scratch)
    return DocumentBatch(name, len(hashes), size, int(pairs[1].min()))


def _pairs(hashes: list[bytes]) -> np.ndarray:
    """Return both halves of each hash: (2, documents) uint64."""
    return np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2).T.astype(np.uint64)


def _record_batch(texts: list[bytes], hashes: list[bytes]) -> pa.RecordBatch:
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    # One long document is joined to itself, without a copy.
    content = pa.py_buffer(b"".join(texts))
    column = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), content)
    return pa.record_batch([column, pa.array(_pairs(hashes)[1])], schema=_SCHEMA)


def read_document_batch(work: Work, name: str) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yield a batch's documents with the second half of their hashes, (documents,) uint64, some at a time."""
    with open(work.document_batch(name), "rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield batch.column("text"), batch.column("low").to_numpy()


# --- duplicates ---


def number_of_partitions(document_batches: Sequence[DocumentBatch]) -> int:
    """Return the number of partitions in which the hashes are compared."""
    return max(
        1, -(-sum(document_batch.documents for document_batch in document_batches) // PARTITION_HASHES)
    )


def find_duplicates(folder: Path, number: int, partitions: int) -> None:
    """Find the documents of partition ``number`` of the hashes that repeat an earlier one.

    The first occurrence in the order of the input stays. Writes (2, duplicates) uint64: document batch and
    position in it, in rising order. Memory depends on the partition's size: a document comes at most once
    from each document batch.
    """
    work = Work(folder)
    bounds = [(number * 2**64) // partitions, ((number + 1) * 2**64) // partitions]
    parts = []
    for index, document_batch in enumerate(load_document_batches(work.document_batches_file)):
        hashes = _load_array(work.hashes(document_batch.name), 3, document_batch.documents)
        # both halves and the position
        first = int(np.searchsorted(hashes[0], np.uint64(bounds[0])))
        last = hashes.shape[1]
        if number + 1 < partitions:
            last = int(np.searchsorted(hashes[0], np.uint64(bounds[1])))
        part = hashes[:, first:last]
        parts.append(np.concatenate([part[:2], np.full((1, last - first), index, np.uint64), part[2:]]))
    high, low, batch_of, position = np.concatenate(parts, axis=1)
    order = np.lexsort((position, batch_of, low, high))
    high, low, batch_of, position = high[order], low[order], batch_of[order], position[order]
    repeats = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1])) + 1
    found = np.stack([batch_of[repeats], position[repeats]])
    found = found[:, np.lexsort((found[1], found[0]))]
    write_array(work.duplicates(number), found, work.scratch)


def _load_array(path: Path, rows: int, columns: int | None = None) -> np.ndarray:
    """Map an array of unfinished work into memory: (rows, columns) uint64, of any number where it is None."""
    try:
        found = np.load(path, mmap_mode="r")
        whole = found.dtype == np.uint64 and found.shape == (rows, columns or found.shape[-1])
    except (ValueError, EOFError, IndexError, SyntaxError) as error:  # of a header that is no array's
        raise _damaged(path, error) from error
    if not whole:
        raise _damaged(path, f"it holds {found.dtype} of shape {found.shape}")
    return found


def _damaged(path: Path, what: object) -> UserError:
    return UserError(f"damaged ({what}). Remove {path.parent}, and run the same command again", path)


def duplicates_of(work: Work, document_batch: int, partitions: int) -> np.ndarray:
    """List the positions in document batch ``document_batch`` whose documents repeat an earlier one."""
    positions = []
    for number in range(partitions):
        found = _load_array(work.duplicates(number), 2)
        first, last = np.searchsorted(
            found[0], np.array([document_batch, document_batch + 1], dtype=np.uint64)
        )
        positions.append(np.asarray(found[1, first:last]))
    return np.concatenate([np.empty(0, np.uint64), *positions])
