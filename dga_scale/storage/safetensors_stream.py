"""Write safetensors files as a stream, one tensor in memory at a time, and read them by ranges."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dga_scale.errors import UserError
from dga_scale.storage.typed_json import build

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 22
_SYNC_EVERY = 1 << 27
"""The bytes written after which a sync to the disk is started."""

MAX_FILE_BYTES = 5_000_000_000
"""The largest size of one file of a model for ``from_pretrained``; a larger model lies in several files."""


@dataclass(frozen=True)
class FileRecord:
    """The size and hash that a written file has to have when it is read again."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: described in advance, produced (on any device) only when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The size of the tensor in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> FileRecord:
    """Write a safetensors file, wait until it is on the disk, and return its size and hash.

    It takes the memory of the largest tensor. The format is 8 bytes of header length, a JSON header, and the
    tensors' bytes.

    Raises:
        OSError: The disk is full or the folder is gone; an incomplete file may be left.
    """
    digest = hashlib.sha256()
    size = _write(path, entries, metadata, digest.update)
    return FileRecord(size, digest.hexdigest())


def _write(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    process: Callable[[Any], None] = lambda chunk: None,
) -> int:
    """Write and sync a file, call ``process`` on each chunk in a thread meanwhile, and return its size.

    Hashing, writing into the system's cache and syncing to the disk take about the same time each: here they
    run at once. An error of a sync in its thread is raised here too.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    syncing: Future[None] | None = None
    synced = 0
    with open(path, "wb") as stream, ThreadPoolExecutor(2) as threads:
        for chunk in _chunks(len(encoded).to_bytes(8, "little") + encoded, entries):
            processing = threads.submit(process, chunk)
            stream.write(chunk)
            processing.result()
            if stream.tell() - synced > _SYNC_EVERY and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()
                synced, syncing = stream.tell(), threads.submit(os.fsync, stream.fileno())
        if syncing is not None:
            syncing.result()
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _chunks(header: bytes, entries: Sequence[Entry]) -> Iterable[Any]:
    yield header
    for entry in entries:
        tensor = entry.produce().detach().to("cpu", entry.dtype).contiguous()
        assert tuple(tensor.shape) == entry.shape, entry.name
        content = tensor.view(-1).view(torch.uint8).numpy()
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK].data


def write_model_files(folder: Path, entries: Sequence[Entry]) -> None:
    """Write a model's weights for ``from_pretrained``: one file, or several and an index.

    Raises:
        OSError: The disk is full or the folder is gone; incomplete files may be left.
    """
    files: list[list[Entry]] = [[]]
    for each in entries:
        if files[-1] and sum(e.bytes for e in files[-1]) + each.bytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(each)
    where: dict[str, str] = {}
    for number, content in enumerate(files, 1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        _write(folder / f"model{suffix}.safetensors", content, {"format": "pt"})
        where |= {e.name: f"model{suffix}.safetensors" for e in content}
    if len(files) > 1:
        size = sum(e.bytes for e in entries)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def record_of(path: Path) -> FileRecord:
    """Read a whole file and return its size and hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        return FileRecord(stream.tell(), digest.hexdigest())


@dataclass(frozen=True)
class Segment:
    """The entries from ``start`` to ``start + length`` of a flattened parameter, stored in a file."""

    file: Path
    key: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A parameter (or one of its moments) in segments, sorted by their start, without gaps or overlaps."""

    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


_Segments = dict[str, tuple[int, tuple[int, ...]]]


class SegmentReader:
    """Reads ranges of parameters whose segments lie in several files; the files are memory-mapped.

    The metadata of each file has ``segments``: JSON of key -> [start, shape of the full parameter].

    Raises:
        UserError: A file can't be read or has no such metadata.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._open: dict[Path, Any] = {}
        found: dict[str, tuple[tuple[int, ...], list[Segment]]] = {}
        self.metadata: list[dict[str, str]] = []
        for file in files:
            try:
                handle = self._open[file] = safe_open(file, framework="pt")
                metadata = handle.metadata() or {}
                segments = build(_Segments, json.loads(metadata["segments"]), "segments")
                for key, (start, shape) in segments.items():
                    (length,) = handle.get_slice(key).get_shape()
                    if found.setdefault(key, (shape, []))[0] != shape or start + length > math.prod(shape):
                        raise ValueError(f"{key} has no entries from {start} to {start + length}")
                    found[key][1].append(Segment(file, key, start, length))
            except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
                raise UserError(f"damaged ({error}): restore it, or start anew", file) from None
            self.metadata.append(metadata)
        self.stored = {
            key: Stored(shape, tuple(sorted(segments, key=lambda segment: segment.start)))
            for key, (shape, segments) in found.items()
        }

    def __enter__(self) -> "SegmentReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def read(self, key: str, start: int, into: Tensor) -> int:
        """Fill ``into`` (n,) with the entries from ``start`` on; return how many of them the files hold."""
        if key not in self.stored:
            raise UserError(f"damaged (there is no {key}): restore it", next(iter(self._open), None))
        filled, stop = 0, start + into.numel()
        for segment in self.stored[key].segments:
            first, last = max(start, segment.start), min(stop, segment.start + segment.length)
            if first < last:
                stored = self._open[segment.file].get_slice(key)
                into[first - start : last - start].copy_(stored[first - segment.start : last - segment.start])
                filled += last - first
        return filled

    def full(self, key: str) -> Tensor:
        """Return a whole parameter in fp32, assembled from its segments."""
        stored = self.stored[key]
        tensor = torch.empty(stored.shape)
        filled = self.read(key, 0, tensor.view(-1))
        if filled < tensor.numel():
            raise UserError(f"damaged (it has a part of {key} only): restore it", stored.segments[0].file)
        return tensor
