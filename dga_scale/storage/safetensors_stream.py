"""Safetensors files written as a stream, one tensor in memory at a time, and read by ranges."""

import hashlib
import json
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

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 22
_SYNC_EVERY = 1 << 27
"""Bytes written after which the disk is set to work."""

MAX_FILE_BYTES = 5_000_000_000
"""Of one file of a model that ``from_pretrained`` reads; a larger model lies in several."""


@dataclass(frozen=True)
class FileRecord:
    """What a written file has to look like when it is read again."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: described now, produced (on any device) when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> FileRecord:
    """Write a safetensors file and wait until it is on the disk.

    Memory: the largest tensor. The format is 8 bytes of header length, a JSON header, the tensors' bytes.

    Raises:
        OSError: the disk is full or the folder is gone; a part of the file may be left.
    """
    digest = hashlib.sha256()
    size = _write(path, entries, metadata, digest.update)
    return FileRecord(size, digest.hexdigest())


def _write(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    beside: Callable[[Any], None] = lambda part: None,
) -> int:
    """Write and sync a file; its bytes. ``beside`` gets each part, in a thread, while that is written.

    Hashing, writing into the system's cache and the disk take about as long as one another: here they take
    place at once. What the disk could not do raises here too.
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
        for part in _parts(len(encoded).to_bytes(8, "little") + encoded, entries):
            busy = threads.submit(beside, part)
            stream.write(part)
            busy.result()
            if stream.tell() - synced > _SYNC_EVERY and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()
                synced, syncing = stream.tell(), threads.submit(os.fsync, stream.fileno())
        if syncing is not None:
            syncing.result()
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _parts(head: bytes, entries: Sequence[Entry]) -> Iterable[Any]:
    yield head
    for entry in entries:
        tensor = entry.produce().detach().to("cpu", entry.dtype).contiguous()
        assert tuple(tensor.shape) == entry.shape, entry.name
        content = tensor.view(-1).view(torch.uint8).numpy()
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK].data


def write_model_files(folder: Path, entries: Sequence[Entry]) -> None:
    """Write a model's weights as ``from_pretrained`` finds them: one file, or several and an index.

    Raises:
        OSError: the disk is full or the folder is gone; a part of the files may be left.
    """
    files: list[list[Entry]] = [[]]
    for each in entries:
        if files[-1] and sum(e.bytes for e in files[-1]) + each.bytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(each)
    where: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        _write(folder / f"model{several}.safetensors", part, {"format": "pt"})
        where |= {e.name: f"model{several}.safetensors" for e in part}
    if len(files) > 1:
        size = sum(e.bytes for part in files for e in part)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def record_of(path: Path) -> FileRecord:
    """Read a whole file for its size and hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        return FileRecord(stream.tell(), digest.hexdigest())


@dataclass(frozen=True)
class Piece:
    """A run of ``length`` entries of a parameter, from ``start`` in the flattened parameter, in a file."""

    file: Path
    key: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A parameter (or a moment of it) in pieces, sorted by their start, without gaps or overlaps."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class PieceReader:
    """Reads ranges of parameters that lie in pieces over several files; the files are memory-mapped.

    Files carry in their metadata ``pieces``: JSON of key -> [start, shape of the full parameter].

    Raises:
        UserError: a file that is none of these.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._open: dict[Path, Any] = {}
        found: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        self.metadata: list[dict[str, str]] = []
        for file in files:
            try:
                handle = self._open[file] = safe_open(file, framework="pt")
                metadata = handle.metadata()
                places = json.loads(metadata["pieces"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{file} is damaged ({error}): restore it, or start anew") from None
            self.metadata.append(metadata)
            for key, (start, shape) in places.items():
                (length,) = handle.get_slice(key).get_shape()
                found.setdefault(key, (tuple(shape), []))[1].append(Piece(file, key, start, length))
        self.stored = {
            key: Stored(shape, tuple(sorted(pieces, key=lambda piece: piece.start)))
            for key, (shape, pieces) in found.items()
        }

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def read(self, key: str, start: int, into: Tensor) -> int:
        """Fill ``into`` (n,) with the entries from ``start`` on; how many of them the files hold."""
        filled, stop = 0, start + into.numel()
        for piece in self.stored[key].pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.length)
            if first < last:
                part = self._open[piece.file].get_slice(key)[first - piece.start : last - piece.start]
                into[first - start : last - start].copy_(part)
                filled += last - first
        return filled

    def full(self, key: str) -> Tensor:
        """Put a whole parameter together, in fp32."""
        stored = self.stored[key]
        tensor = torch.empty(stored.shape)
        filled = self.read(key, 0, tensor.view(-1))
        assert filled == tensor.numel(), f"{key} has gaps"
        return tensor
