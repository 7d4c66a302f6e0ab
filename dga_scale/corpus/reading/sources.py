"""Read text from files and saved datasets as a stream of documents.

A source is cut into segments that can be read on their own (byte ranges of an uncompressed file, row groups
of a parquet file, rows of a saved dataset), so that several processes read one large file.
"""

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dga_scale.corpus.reading.files import COMPRESSIONS, Segment, Source, decode, lines
from dga_scale.corpus.reading.json_array import json_problem, read_array
from dga_scale.errors import UserError

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


def read_segment(source: Source, segment: Segment, options: ReadOptions) -> Iterator[str]:
    """The documents of a segment, as they stand in the source; "" for one without text.

    Raises:
        UserError: Text that is not UTF-8, a line that does not parse, a missing text field, a damaged file;
            each names the file and, where there are lines, the line.
    """
    if source.format == "text" and options.whole_files:
        return _whole_file(source)
    if source.format == "text":
        return (decode(source.path, number, line) for number, line in lines(source, segment))
    if source.format == "jsonl":
        return _jsonl(source, segment, options.text_field)
    if source.format == "json":
        return read_array(source, lambda record, where: _record_text(record, where, options.text_field))
    if source.format in ("csv", "tsv"):
        return _csv(source, options.text_field)
    if source.format == "parquet":
        return _parquet_rows(source, segment, options.text_field)
    if source.format == "saved":
        return _saved_rows(source, segment, options.text_field)
    return _datasets_rows(source, options.text_field)


def _whole_file(source: Source) -> Iterator[str]:
    text = lines(source, Segment.whole(source))
    yield "\n".join(decode(source.path, number, line) for number, line in text)


def _jsonl(source: Source, segment: Segment, text_field: str) -> Iterator[str]:
    for number, line in lines(source, segment):
        if not line.strip():
            continue
        try:
            record = json.loads(decode(source.path, number, line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{number} is not JSON: {json_problem(error)}. Each line must be one object, like "
                f'{{"{text_field}": "..."}}'
            ) from error
        yield _record_text(record, number, text_field)


def _record_text(record: Any, where: object, text_field: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object like {{"{text_field}": "..."}}: {str(record)[:60]!r}')
    if text_field not in record:
        raise UserError(_missing_field(where, text_field, record))
    return _text(record[text_field], where, text_field)


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
    text = (decode(source.path, number, line) + "\n" for number, line in lines(source, Segment.whole(source)))
    if source.format == "tsv":  # a quote is a character there: tabs and line breaks can't stand in a field
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{source.path}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where} is not valid {source.format}: {error}") from error
        if header is None:
            header = row
            if text_field not in header:
                raise UserError(_missing_field(source.path, text_field, header))
        elif row and len(row) != len(header):
            raise UserError(f"{where} has {len(row)} columns, the header has {len(header)}")
        elif row:
            yield row[header.index(text_field)]


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

    # Its patterns would take [ and ] of a name for a choice of letters, and a relative path for a hub's.
    path = glob.escape(str(Path(source.path).absolute()))
    try:
        # Streaming reads the file where it lies instead of copying it into the cache folder.
        for record in datasets.load_dataset(
            str(Path(source.path).absolute().parent), data_files=path, split="train", streaming=True
        ):
            if text_field not in record:
                raise UserError(_missing_field(source.path, text_field, record))
            yield _text(record[text_field], source.path, text_field)
    except UserError:
        raise
    except Exception as error:  # whatever the loader of that format raises
        said = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{source.path}: `datasets` can't read it ({type(error).__name__}: {said}). Endings read here: "
            f"{', '.join(FORMATS)}, the text ones also {', '.join(COMPRESSIONS)}"
        ) from error
