"""Read text from files and saved datasets as a stream of documents.

A source is cut into segments that can be read on their own (byte ranges of an uncompressed file, row groups
of a parquet file, rows of a saved dataset), so that several processes read one large file.
"""

import csv
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dga_scale.corpus.reading.files import (
    COMPRESSIONS,
    BadRecord,
    Line,
    Segment,
    Source,
    check_size,
    decode,
    lines,
)
from dga_scale.corpus.reading.json_array import read_array
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import json_problem

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "datasets",
}
"""The format of each file ending; any other file is tried with ``datasets.load_dataset``."""

_BATCH_ROWS = 256


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in a source."""

    text_field: str
    whole_files: bool
    """Whether a text file is one document, instead of one a line."""
    skip_bad: bool = False
    """Whether a record that can't be read is left out and counted, instead of ending the reading."""
    max_bytes: int = 256_000_000
    """The largest size of a document: a larger one is a bad record."""


@dataclass
class Records:
    """The counts of what was read."""

    good: int = 0
    bad: int = 0
    first_bad: str = ""
    """What is wrong with the first bad record, and where."""


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
    by_line = source.format == "jsonl" or (source.format == "text" and not options.whole_files)
    if by_line and source.compression is None:
        starts = range(0, source.bytes, target)
        return [
            Segment(number, start, min(start + target, source.bytes), min(target, source.bytes - start))
            for start in starts
        ]
    return [Segment.whole(source, number)]


def read_segment(source: Source, segment: Segment, options: ReadOptions, records: Records) -> Iterator[str]:
    """The documents of a segment, as they stand in the source; "" for one without text.

    Args:
        records: The counts, to which those of this segment are added.

    Raises:
        UserError: Text that is not UTF-8, a line that does not parse, a missing text field, a damaged file;
            each names the file and, where there are lines, the line. With ``options.skip_bad`` only what
            makes the whole file unreadable.
    """
    found, read = _READERS[source.format](source, segment, options)
    first = records.good
    for where, record in found:
        try:
            text = read(where, record)
            check_size(where, len(text), options.max_bytes)
        except BadRecord as error:  # noqa: PERF203 - each record may be one
            if not options.skip_bad:
                raise UserError(f"{error}{_context(records.good - first)}") from error
            records.bad += 1
            records.first_bad = records.first_bad or str(error)
        else:
            records.good += 1
            del record  # it may be as large as the text
            yield text


def _context(good: int) -> str:
    """Say what a user needs to tell one bad record from a wrong setting."""
    if not good:
        return ""
    return f" (before it, good: {good:,}). To leave bad records out and count them: --on_bad_record skip"


Reader = tuple[Iterable[tuple[object, Any]], Callable[[object, Any], str]]
"""Where each record stands and what it is, and what makes text of these; the latter raises ``BadRecord``."""


def _lines(source: Source, segment: Segment, options: ReadOptions) -> Reader:
    if options.whole_files:
        return [(source.path, source)], lambda where, whole: _whole_file(whole, options.max_bytes)
    return (
        lines(source, segment, options.max_bytes),
        lambda number, line: decode(source.path, number, line, options.max_bytes),
    )


def _whole_file(source: Source, limit: int) -> str:
    parts, size = [], 0
    for number, line in lines(source, Segment.whole(source), limit):
        size += len(line) + 1
        check_size(source.path, size - 1, limit)
        parts.append(decode(source.path, number, line, limit))
    return "\n".join(parts)


def _jsonl(source: Source, segment: Segment, options: ReadOptions) -> Reader:
    def read(number: object, line: Line) -> str:
        try:
            record = json.loads(decode(source.path, number, line, options.max_bytes))
        except (ValueError, RecursionError) as error:
            raise BadRecord(
                f"{number} is not JSON: {json_problem(error)}. Each line must be one object, like "
                f'{{"{options.text_field}": "..."}}'
            ) from error
        return _record_text(number, record, options.text_field)

    def filled(numbered: tuple[object, Line]) -> bool:
        return bool(numbered[1]) and not numbered[1].isspace()

    return filter(filled, lines(source, segment, options.max_bytes)), read


def _array(source: Source, _: Segment, options: ReadOptions) -> Reader:
    return (
        read_array(source, options.max_bytes),
        lambda where, record: _record_text(where, record, options.text_field),
    )


def _record_text(where: object, record: Any, text_field: str) -> str:
    if not isinstance(record, dict):
        raise BadRecord(f'{where} is not an object like {{"{text_field}": "..."}}: {str(record)[:60]!r}')
    if text_field not in record:
        raise BadRecord(_missing_field(where, text_field, record))
    return _text(where, record[text_field], text_field)


def _missing_field(where: object, text_field: str, fields: Iterable[str]) -> str:
    present = ", ".join(sorted(map(str, fields))) or "none"
    return f"{where} has no field {text_field!r}. Fields present: {present}. Choose one with --text_field"


def _text(where: object, value: Any, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(
            f"{where}: field {text_field!r} holds a {type(value).__name__}, not text. Choose another with "
            "--text_field"
        )
    return value


def _csv(source: Source, segment: Segment, options: ReadOptions) -> Reader:
    rows = _csv_rows(source, segment, options)
    header = next(rows, (source.path, []))[1]
    if options.text_field not in header:
        raise UserError(_missing_field(source.path, options.text_field, header))
    column = header.index(options.text_field)

    def read(where: object, row: list[str]) -> str:
        if len(row) != len(header):
            raise BadRecord(f"{where} has {len(row)} columns, the header has {len(header)}")
        return row[column]

    return rows, read


def _csv_rows(source: Source, segment: Segment, options: ReadOptions) -> Iterator[tuple[str, list[str]]]:
    """Yield where each row begins, and the row, the header first; empty lines are none."""
    csv.field_size_limit(options.max_bytes)
    # Decoded line by line, not by a TextIOWrapper, so that an error can name its line.
    text = (
        decode(source.path, number, line, options.max_bytes) + "\n"
        for number, line in lines(source, segment, options.max_bytes)
    )
    if source.format == "tsv":  # a quote is a character there: tabs and line breaks can't stand in a field
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(text, strict=True)
    while True:
        where = f"{source.path}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where} is not valid {source.format}: {error}") from error
        if row:
            yield where, row


def _parquet(source: Source) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source.path)
    except pa.ArrowException as error:
        raise UserError(f"{source.path} is not a parquet file, or damaged: {error}") from error


def _values(
    rows: Callable[[Source, Segment, str], Iterator[Any]],
) -> Callable[[Source, Segment, ReadOptions], Reader]:
    """Make a reader of what yields the values of the text field, whose places have no number."""

    def reader(source: Source, segment: Segment, options: ReadOptions) -> Reader:
        found = ((source.path, value) for value in rows(source, segment, options.text_field))
        return found, lambda where, value: _text(where, value, options.text_field)

    return reader


def _parquet_rows(source: Source, segment: Segment, text_field: str) -> Iterator[Any]:
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
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source.path} is damaged: {error}") from error


def _saved(source: Source) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(source.path)
    except Exception as error:  # whatever a broken folder raises inside datasets
        raise UserError(f"the saved dataset {source.path} can't be opened: {error}") from error


def _saved_rows(source: Source, segment: Segment, text_field: str) -> Iterator[Any]:
    dataset = _saved(source)
    if text_field not in dataset.column_names:
        raise UserError(_missing_field(source.path, text_field, dataset.column_names))
    assert segment.stop is not None
    dataset = dataset.select_columns(text_field)
    for start in range(segment.start, segment.stop, _BATCH_ROWS):
        yield from dataset[start : min(start + _BATCH_ROWS, segment.stop)][text_field]


def _datasets_rows(source: Source, _: Segment, text_field: str) -> Iterator[Any]:
    import datasets

    # Its patterns would take [ and ] of a name for a choice of letters, and a relative path for a hub's.
    path = glob.escape(str(Path(source.path).absolute()))
    try:
        # Streaming reads the file where it lies instead of copying it into the cache folder.
        for record in datasets.load_dataset(
            str(Path(source.path).absolute().parent), data_files=path, split="train", streaming=True
        ):
            if text_field not in record:
                raise UserError(_missing_field(source.path, text_field, record))
            yield record[text_field]
    except UserError:
        raise
    except Exception as error:  # whatever the loader of that format raises
        said = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{source.path}: `datasets` can't read it ({type(error).__name__}: {said}). Endings read here: "
            f"{', '.join(FORMATS)}, the text ones also {', '.join(COMPRESSIONS)}"
        ) from error


_READERS: dict[str, Callable[[Source, Segment, ReadOptions], Reader]] = {
    "text": _lines,
    "jsonl": _jsonl,
    "json": _array,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _values(_parquet_rows),
    "saved": _values(_saved_rows),
    "datasets": _values(_datasets_rows),
}
