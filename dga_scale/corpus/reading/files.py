"""Open a file of text: decompressed by its content, checked to be UTF-8, line by line."""

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dga_scale.errors import UserError
from dga_scale.storage.typed_json import SignedInt

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

FIRST_BYTES = 1 << 16
"""The number of bytes of a file, decompressed, by which its content is told."""

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_ENOUGH = 16
"""The bytes of text from which its most frequent byte says something."""

_BUFFER = 1 << 20
_GIVEN_UP = (OSError, EOFError, lzma.LZMAError)
"""The errors of a decompressor on damaged or truncated data."""


@dataclass(frozen=True)
class Source:
    """One input: a file, or a folder that ``datasets`` saved."""

    path: str
    format: str
    """The format: "text", "jsonl", "json", "csv", "tsv", "parquet", "saved" (``save_to_disk``) or "datasets".
    """
    compression: str | None
    bytes: int
    fingerprint: str
    """A hash over the beginning and the end of the file, which most changes of its content change."""
    modified: SignedInt
    """The time of the last change, in nanoseconds since 1970."""

    def check_unchanged(self) -> None:
        """Refuse a source that is another one than when it was found.

        Raises:
            UserError: Its size or time of the last change differ, or it is gone.
        """
        try:
            unchanged = (self.bytes, self.modified) == size_and_time(files_of(Path(self.path)))
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"input {self.path} was changed while it was read. Wait until nothing writes to it, then run "
                "the same command again: what was read of other files is kept"
            )


@dataclass(frozen=True)
class Segment:
    """A range of a source that is read on its own: [start, stop) in bytes, row groups or rows."""

    source: int
    start: int
    stop: int | None
    """The end of the range; None: the end of the source."""
    weight: int
    """The approximate size in bytes, by which segments are grouped into input splits of similar size."""

    @classmethod
    def whole(cls, source: Source, number: int = 0) -> "Segment":
        """Return all of a source as one segment."""
        return cls(number, 0, None, source.bytes)


class BadRecord(UserError):
    """A single document of a source that can't be read, where the others may be right."""


def files_of(path: Path) -> list[Path]:
    """Return a file, or the files of a folder, sorted."""
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


def size_and_time(files: Sequence[Path]) -> tuple[int, int]:
    """Return the bytes of some files, and the time of the last change, in nanoseconds."""
    found = [file.stat() for file in files]
    return sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)


def compression_of(path: Path, start: bytes) -> str | None:
    """Return the compression that a file's first bytes tell, or else its ending; None: it is plain."""
    found = (name for magic, name in _MAGIC.items() if start.startswith(magic))
    return next(found, COMPRESSIONS.get(path.suffix.lower()))


def open_bytes(path: str, compression: str | None) -> BinaryIO:
    """Open a file for reading its bytes, decompressed.

    Raises:
        UserError: The file can't be opened.
    """
    try:
        match compression:
            case None:
                return open(path, "rb", buffering=_BUFFER)
            case "gzip":
                return io.BufferedReader(gzip.open(path), _BUFFER)
            case "bz2":
                return io.BufferedReader(bz2.open(path), _BUFFER)
            case "xz":
                return io.BufferedReader(lzma.open(path), _BUFFER)
        return io.BufferedReader(pa.input_stream(path, compression=compression), _BUFFER)
    except OSError as error:
        raise UserError(f"input file {path} can't be read: {error}") from error


def first_bytes(path: str, compression: str | None) -> bytes:
    """Return the first bytes of a file, decompressed: at most ``FIRST_BYTES``, all of a shorter file.

    Raises:
        UserError: The file can't be read, or is damaged.
    """
    with open_bytes(path, compression) as file:
        return _reading(path, compression, lambda: file.read(FIRST_BYTES))


def blocks(source: Source) -> Iterator[bytes]:
    """Yield a source's bytes, decompressed, some at a time.

    Raises:
        UserError: The file can't be read, or is damaged.
    """
    with open_bytes(source.path, source.compression) as file:
        while block := _reading(source.path, source.compression, lambda: file.read(_BUFFER)):
            yield block


Line = bytes | bytearray
"""The bytes of a line; what was put together of several blocks stays a bytearray, which is not copied."""


def lines(source: Source, segment: Segment, limit: int) -> Iterator[tuple["LineNumber", Line]]:
    """Yield the lines whose first byte lies in the segment, without line break and byte order mark.

    A line ends with ``\n``, ``\r\n`` or ``\r``. Segments are cut at ``\\n`` only: a file that has none is
    one segment's. Of a line longer than ``limit`` bytes only its beginning is held, which is longer too:
    ``decode`` refuses it. A line that was yielded is not held here any more.

    Raises:
        UserError: The file can't be read, is damaged, or is empty once decompressed.
    """
    path, compression = source.path, source.compression
    number = LineNumber(source, segment.start)
    with open_bytes(path, compression) as file:
        position = segment.start
        if segment.start:
            file.seek(segment.start - 1)
            position += len(file.readline()) - 1

        def read() -> bytes:
            nonlocal position
            block = _reading(path, compression, lambda: file.readline(_BUFFER))
            position += len(block)
            return block

        while segment.stop is None or position < segment.stop:
            before = position
            yield from map(number.count, _parts(read, limit))
            if position == before:
                break
        if position == 0:
            raise UserError(f"input file {path} is empty once decompressed. Remove it from the inputs")


def _parts(read: Callable[[], bytes], limit: int) -> Iterator[Line]:
    """Read blocks up to the next ``\\n``, and yield what is between its ``\\r``; nothing at a file's end."""
    held = bytearray()  # of a line that goes on in the next block
    half = b""  # perhaps of a line break
    begun = False
    while block := read():
        ended = block.endswith(b"\n")
        if ended and not begun and b"\r" not in block:  # as nearly all are
            yield block[:-1]
            return
        begun = True
        block = half + block.removesuffix(b"\n")
        half = b"\r" if block.endswith(b"\r") and not ended else b""
        *whole, rest = block.removesuffix(b"\r").split(b"\r")
        for part in whole:
            held += part
            done, held = [held], bytearray()
            yield done.pop()  # held by the reader alone, which may have no memory for two
        if len(held) <= limit:
            held += rest
        if ended:
            break
    if begun:
        done, held = [held], bytearray()
        yield done.pop()


def check_size(where: object, size: int, limit: int) -> None:
    """Refuse a document of more than ``limit`` bytes.

    Raises:
        BadRecord: It is larger.
    """
    if size > limit:
        raise BadRecord(
            f"{where} is a document of more than {limit / 1e6:g} MB. A line break may be missing; else raise "
            "--max_document_mb"
        )


def decode(path: str, where: object, line: Line, limit: int) -> str:
    """Decode a line of a file.

    Raises:
        BadRecord: The line is longer than ``limit`` bytes, or no UTF-8; it says at which column.
    """
    check_size(where, len(line), limit)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}. "
            + _convert(path, "ENCODING")
            + ", with the file's own, for example ISO-8859-1"
        ) from error


class LineNumber:
    """The number of the last line read; lines before the segment are counted only when it is printed."""

    def __init__(self, source: Source, start: int) -> None:
        self._source, self._start = source, start
        self.read = 0

    def count(self, line: Line) -> tuple["LineNumber", Line]:
        """Count the next line, and return its number with it, without byte order mark."""
        self.read += 1
        # Files with a mark of their own may have been put together.
        return self, line[len(codecs.BOM_UTF8) :] if line.startswith(codecs.BOM_UTF8) else line

    def __str__(self) -> str:
        before = 0
        if self._start:
            # A line starts at byte 0 and after each line break.
            before = 1
            with open(self._source.path, "rb") as file:
                remaining = self._start - 1
                while block := file.read(min(remaining, _BUFFER)):
                    remaining -= len(block)
                    if block.endswith(b"\r") and remaining:  # perhaps half a line break
                        block += file.read(1)
                        remaining -= 1
                    before += len(re.findall(rb"\n|\r(?!\n)", block))
        return f"{self._source.path}:{before + self.read}"


def _reading(path: str, compression: str | None, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _GIVEN_UP as error:
        window = _zstd_window(path) if compression == "zstd" else 0
        if window > 1 << 27:
            plain = Path(path).name.removesuffix(".zst")
            raise UserError(
                f"{path} is intact, but wants {window / 2**30:.1f} GiB of memory to be decompressed, for its "
                f"window. Decompress it first: zstd -d --long=31 {Path(path).name} -o {plain}"
            ) from error
        kind = f"damaged or not a {compression} file" if compression else "damaged"
        raise UserError(f"{path} is {kind}: {error}") from error


def _zstd_window(path: str) -> int:
    """Return the bytes of the window that a Zstandard file asks for; 0 where it is that of its content.

    Source: RFC 8878, 3.1.1.1.
    """
    with open(path, "rb") as file:
        header = file.read(6)
    if len(header) < 6 or header[4] & 0x20:
        return 0
    exponent, mantissa = header[5] >> 3, header[5] & 7
    return (1 << (10 + exponent)) * (8 + mantissa) // 8


def check_encoding(path: str, start: bytes) -> None:
    """Refuse text in UTF-16 or UTF-32, with a mark or without: much of it is UTF-8 too, of other letters.

    Raises:
        UserError: The first bytes of the file are in one of these; it says how to convert it.
    """
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            raise UserError(f"{path} is not UTF-8: it has the mark of {name}. {_convert(path, name)}")
    if guess := _encoding_without_mark(start):
        raise UserError(
            f"{path} is not UTF-8: its zero bytes stand where {guess} has them. {_convert(path, guess)}"
        )


def _encoding_without_mark(start: bytes) -> str | None:
    """Name the encoding that has its zero bytes where this text has them; None for UTF-8.

    Of UTF-32's four bytes two are zero. Of UTF-16's two bytes one is zero for Latin letters, spaces and line
    breaks, and another one for all letters of most scripts. In UTF-8 with zero bytes in it, whatever they are
    for, letters of all kinds stand in the places of either.
    """
    length, zeros = len(start), [start[place::4].count(0) for place in range(4)]
    total = sum(zeros)
    for name, high, low in (("UTF-32LE", zeros[2:], zeros[0]), ("UTF-32BE", zeros[:2], zeros[3])):
        if min(high) > 0.9 * (length // 4) and low < 0.1 * (length // 4):
            return name
    for name, first in (("UTF-16LE", 1), ("UTF-16BE", 0)):
        counts = Counter(start[first::2])
        own = counts.pop(0, 0)
        script = max(counts.values(), default=0) if length >= _ENOUGH else 0
        if own and own >= 0.9 * total and own + script >= 0.8 * (length // 2):
            return name
    return None


def _convert(path: str, encoding: str) -> str:
    name = Path(path).name
    return f"Convert the file first: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"
