"""Read text from files and saved datasets as a stream of documents.

A source is cut into segments that can be read on their own (byte ranges of an uncompressed file, row groups
of a parquet file, rows of a saved dataset), so that several processes read one large file.
"""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dga_scale.errors import UserError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "datasets",
}
"""The format of each file ending; any other file is tried with ``datasets.load_dataset``."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_BATCH_ROWS = 256


@dataclass(frozen=True)
class Source:
    """One input: a file, or a folder that ``datasets`` saved."""

    path: str
    format: str
    """The format: "text", "jsonl", "csv", "tsv", "parquet", "saved" (``save_to_disk``) or "datasets"."""
    compression: str | None
    bytes: int
    fingerprint: str
    """A hash over the size, the beginning and the end of the file, which changes when the content does."""


@dataclass(frozen=True)
class Segment:
    """A range of a source that is read on its own: [start, stop) in bytes, row groups or rows."""

    source: int
    start: int
    stop: int | None
    """The end of the range; None: the end of the source."""
    weight: int
    """The approximate size in bytes, by which segments are grouped into input splits of similar size."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in a source."""

    text_field: str
    whole_files: bool
    """Whether a text file is one document, instead of one a line."""


def segments(number: int, source: Source, options: ReadOptions, target: int) -> list[Segment]:
    """Cut source ``number`` into segments of about ``target`` bytes, where its format allows."""
    if source.format == "parquet":
        groups = _parquet(source).metadata
        sizes = [groups.row_group(index).total_byte_size for index in range(groups.num_row_groups)]
        return [Segment(number, index, index + 1, size) for index, size in enumerate(sizes)]
    if source.format == "saved":
        rows = len(_saved(source))
        step = max(1, rows * target // max(1, source.bytes))
        return [
            Segment(number, start, min(start + step, rows), source.bytes * step // max(1, rows))
            for start in range(0, rows, step)
        ]
    lines = source.format == "jsonl" or (source.format == "text" and not options.whole_files)
    if lines and source.compression is None:
        starts = range(0, source.bytes, target)
        return [
            Segment(number, start, min(start + target, source.bytes), min(target, source.bytes - start))
            for start in starts
        ]
    return [Segment(number, 0, None, source.bytes)]


def read_segment(source: Source, segment: Segment, options: ReadOptions) -> Iterator[str]:
    """The documents of a segment, as they stand in the source; "" for one without text.

    Raises:
        UserError: text that is not UTF-8, a line that does not parse, a missing text field, a damaged file;
            each names the file and, where there are lines, the line.
    """
    if source.format == "text" and options.whole_files:
        return _whole_file(source)
    if source.format == "text":
        return (_decode(source, number, line) for number, line in _lines(source, segment))
    if source.format == "jsonl":
        return _jsonl(source, segment, options.text_field)
    if source.format in ("csv", "tsv"):
        return _csv(source, options.text_field)
    if source.format == "parquet":
        return _parquet_rows(source, segment, options.text_field)
    if source.format == "saved":
        return _saved_rows(source, segment, options.text_field)
    return _datasets_rows(source, options.text_field)


def _open(source: Source) -> BinaryIO:
    try:
        if source.compression is None:
            return open(source.path, "rb")
        # pyarrow's streams read concatenated members and notice a truncated file, for gzip and zstd alike.
        stream = pa.input_stream(source.path, compression=source.compression)
    except OSError as error:
        raise UserError(f"input file {source.path} can't be read: {error}") from error
    return io.BufferedReader(stream, 1 << 20)


def _lines(source: Source, segment: Segment) -> Iterator[tuple["_LineNumber", bytes]]:
    """Yield the lines whose first byte lies in the segment, without their line break."""
    number = _LineNumber(source, segment.start)
    with _open(source) as file:
        position = segment.start
        if segment.start:
            file.seek(segment.start - 1)
            position += len(file.readline()) - 1
        while segment.stop is None or position < segment.stop:
            try:
                line = file.readline()
            except OSError as error:
                raise UserError(
                    f"{source.path} is damaged or not a {source.compression} file: {error}"
                ) from error
            if not line:
                break
            first, position = position == 0, position + len(line)
            number.read += 1
            yield number, line.removeprefix(codecs.BOM_UTF8 if first else b"").rstrip(b"\r\n")
        if position == 0:
            raise UserError(f"input file {source.path} is empty once decompressed. Remove it from the inputs")


class _LineNumber:
    """The number of the last line read; lines before the segment are counted only when it is printed."""

    def __init__(self, source: Source, start: int) -> None:
        self._source, self._start = source, start
        self.read = 0

    def __str__(self) -> str:
        before = 0
        if self._start:
            # A line starts at byte 0 and after each line break.
            before = 1
            with open(self._source.path, "rb") as file:
                remaining = self._start - 1
                while block := file.read(min(remaining, 1 << 20)):
                    before += block.count(b"\n")
                    remaining -= len(block)
        return f"{self._source.path}:{before + self.read}"


def _decode(source: Source, where: object, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}. Convert the "
            f"file first, for example: iconv -f ISO-8859-1 -t UTF-8 {Path(source.path).name}"
        ) from error


def _whole_file(source: Source) -> Iterator[str]:
    lines = _lines(source, Segment(0, 0, None, 0))
    yield "\n".join(_decode(source, number, line) for number, line in lines)


def _jsonl(source: Source, segment: Segment, text_field: str) -> Iterator[str]:
    for number, line in _lines(source, segment):
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(source, number, line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{number} is not JSON: {error.msg} at column {error.colno}. Each line must be one object, "
                f'like {{"{text_field}": "..."}}'
            ) from error
        if not isinstance(record, dict):
            raise UserError(f'{number} is not an object like {{"{text_field}": "..."}}: {line[:60]!r}')
        if text_field not in record:
            raise UserError(_missing_field(number, text_field, record))
        yield _text(record[text_field], number, text_field)


def _missing_field(where: object, text_field: str, fields: Iterable[str]) -> str:
    present = ", ".join(sorted(map(str, fields))) or "none"
    return f"{where} has no field {text_field!r}. Fields present: {present}. Choose one with --text_field"


def _text(value: Any, where: object, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {text_field!r} holds a {type(value).__name__}, not text. Choose another with "
            "--text_field"
        )
    return value


def _csv(source: Source, text_field: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    # Decoded line by line, not by a TextIOWrapper, so that an error can name its line.
    lines = (_decode(source, number, line) + "\n" for number, line in _lines(source, Segment(0, 0, None, 0)))
    rows = csv.reader(lines, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    header = next(rows)
    if text_field not in header:
        raise UserError(_missing_field(source.path, text_field, header))
    column = header.index(text_field)
    while True:
        where = f"{source.path}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where} is not valid {source.format}: {error}") from error
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(f"{where} has {len(row)} columns, the header has {len(header)}")
        yield row[column]


def _parquet(source: Source) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source.path)
    except pa.ArrowException as error:
        raise UserError(f"{source.path} is not a parquet file, or damaged: {error}") from error


def _parquet_rows(source: Source, segment: Segment, text_field: str) -> Iterator[str]:
    assert segment.stop is not None
    with _parquet(source) as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(_missing_field(source.path, text_field, file.schema_arrow.names))
        try:
            for batch in file.iter_batches(
                batch_size=_BATCH_ROWS,
                row_groups=list(range(segment.start, segment.stop)),
                columns=[text_field],
                use_threads=False,
            ):
                for value in batch.column(0).to_pylist():
                    yield _text(value, source.path, text_field)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source.path} is damaged: {error}") from error


def _saved(source: Source) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(source.path)
    except Exception as error:  # whatever a broken folder raises inside datasets
        raise UserError(f"the saved dataset {source.path} can't be opened: {error}") from error


def _saved_rows(source: Source, segment: Segment, text_field: str) -> Iterator[str]:
    dataset = _saved(source)
    if text_field not in dataset.column_names:
        raise UserError(_missing_field(source.path, text_field, dataset.column_names))
    assert segment.stop is not None
    dataset = dataset.select_columns(text_field)
    for start in range(segment.start, segment.stop, _BATCH_ROWS):
        for value in dataset[start : min(start + _BATCH_ROWS, segment.stop)][text_field]:
            yield _text(value, source.path, text_field)


def _datasets_rows(source: Source, text_field: str) -> Iterator[str]:
    import datasets

    path = Path(source.path)
    try:
        # Streaming reads the file where it lies instead of copying it into the cache folder.
        rows = iter(
            datasets.load_dataset(str(path.parent), data_files=path.name, split="train", streaming=True)
        )
        for record in rows:
            if text_field not in record:
                raise UserError(_missing_field(source.path, text_field, record))
            yield _text(record[text_field], source.path, text_field)
    except UserError:
        raise
    except Exception as error:  # whatever the loader of that format raises
        endings = ", ".join(FORMATS)
        raise UserError(
            f"{source.path}: `datasets` can't read it ({type(error).__name__}: {error}). Endings read here: "
            f"{endings}, the text ones also .gz and .zst"
        ) from error
