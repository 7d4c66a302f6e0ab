"""Every input format and compression gives the same documents; every bad input a clear error."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dga_scale.corpus.reading.files import Segment
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment, segments
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny

DOCUMENTS = tiny.texts(60)

SMALL = 400
"""Bytes of a segment, so that these files are cut in many."""


def read(
    *inputs: Path | str,
    field: str = "text",
    whole_files: bool = False,
    target: int = SMALL,
    records: Records | None = None,
    **options_of_records: Any,
) -> list[str]:
    options = ReadOptions(field, whole_files, **options_of_records)
    records = records or Records()
    sources = find_sources([*map(str, inputs)])
    return [
        text
        for number, source in enumerate(sources)
        for segment in segments(number, source, options, target)
        for text in read_segment(source, segment, options, records)
    ]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def as_txt(path: Path) -> None:
    path.write_text("\n".join(DOCUMENTS) + "\n")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def as_csv(path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(DOCUMENTS))


def as_parquet(path: Path) -> None:
    table = pa.table({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))})
    pq.write_table(table, path, row_group_size=7)


def as_arrow(path: Path) -> None:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as writer,
    ):
        writer.write_table(pa.table({"text": DOCUMENTS}))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": as_txt,
    "a.jsonl": lambda path: tiny.write_jsonl(path, DOCUMENTS),
    "a.csv": as_csv,
    "a.tsv": lambda path: path.write_text(
        "".join(f"{i}\t{t}\n" for i, t in [("id", "text"), *enumerate(DOCUMENTS)])
    ),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1)),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == DOCUMENTS
    assert read(tmp_path) == DOCUMENTS
    assert read(tmp_path / "a.*", target=10**9) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.json"])
@pytest.mark.parametrize("ending", COMPRESS)
def test_compressions(name: str, ending: str, tmp_path: Path) -> None:
    plain = tmp_path / name
    WRITERS[name](plain)
    data = plain.read_bytes()
    plain.unlink()
    compress = COMPRESS[ending]
    # Two members in one file, as `cat a.gz b.gz` makes.
    half = len(data) // 2
    (tmp_path / (name + ending)).write_bytes(compress(data[:half]) + compress(data[half:]))
    assert read(tmp_path) == DOCUMENTS
    # The content tells, whatever the name.
    (tmp_path / (name + ending)).rename(plain)
    assert read(plain) == DOCUMENTS


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": list(range(len(DOCUMENTS)))})
    dataset.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == DOCUMENTS
    assert read(tmp_path) == DOCUMENTS
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two" / "train") == DOCUMENTS
    with pytest.raises(UserError, match=r"DatasetDict: name the split to read, .*two/train or .*two/test"):
        read(tmp_path / "two")


def test_any_file_that_datasets_reads(tmp_path: Path) -> None:
    folder = tmp_path / "with [brackets]"
    folder.mkdir()
    as_arrow(folder / "a[1].arrow")
    assert read(folder / "a[1].arrow") == DOCUMENTS
    (tmp_path / "a.strange").write_text("?")
    with pytest.raises(
        UserError, match=r"a\.strange: `datasets` can't read it .* Endings read here: \.txt"
    ) as e:
        read(tmp_path / "a.strange")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("target", [1, 7, 10, 11, 50, 333, 10**6])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_cut_anywhere_no_line_is_lost_or_read_twice(target: int, line_break: bytes, tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + "ünder".encode(), b"", b"x", b"yy" * 40, b"z"]
    (tmp_path / "a.txt").write_bytes(line_break.join(lines))
    assert read(tmp_path / "a.txt", target=target) == ["ünder", "", "x", "yy" * 40, "z"]


def test_whole_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\nfive"))
    assert read(tmp_path, whole_files=True) == ["one\ntwo\n\nthree", "four\nfive"]


def test_nulls_are_documents_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["", "x"]
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["x", ""]


def test_csv_fields_hold_quotes_delimiters_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n"one, ""two""\nthree",1\nfour,2\n')
    assert read(tmp_path / "a.csv") == ['one, "two"\nthree', "four"]


@pytest.mark.parametrize("target", [1, 5, 10**6])
def test_carriage_returns_end_lines(target: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\nthree\n\rfour\r")
    assert read(tmp_path / "a.txt", target=target) == ["one", "two", "three", "", "four"]
    (tmp_path / "a.csv").write_bytes(b'text,id\rone,1\r"two\rlines",2\r')
    assert read(tmp_path / "a.csv") == ["one", "two\nlines"]
    (tmp_path / "b.txt").write_bytes(b"one\rtwo\r\nthree\n\rfo\xe9ur\r")
    with pytest.raises(UserError, match=r"b\.txt:5 is not UTF-8"):
        read(tmp_path / "b.txt", target=target)


def test_a_quote_in_tsv_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\tn\n1\t"Great, it\t5\n2\tsecond\t5\n3\tto the end"\t4\n')
    assert read(tmp_path / "a.tsv") == ['"Great, it', "second", 'to the end"']


def test_padding_and_marks_between_members(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + bytes(512))
    assert read(tmp_path / "a.txt.gz") == ["one"]
    (tmp_path / "a.jsonl").write_bytes(2 * b'\xef\xbb\xbf{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x", "x"]


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd command is not installed")
def test_a_window_too_long_for_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    subprocess.run(["zstd", "-q", "--ultra", "-20", "--long=31", "-o", path], input=b"one\n", check=True)
    with pytest.raises(
        UserError, match=r"intact, but wants 2\.0 GiB .* zstd -d --long=31 a\.txt\.zst -o a\.txt"
    ):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "x"}\n{"text": "y"}]', r"a\.json:2 is not JSON: ']' expected, '{' found"),
        (b'[{"text": "x"},\n{"text": "y"', r"a\.json:2 is not JSON: "),
        (b'[{"text": "x"}', r"a\.json:1 is not JSON: ']' expected, 'the end' found"),
        (b'[{"text": "x"}]\n\n[]', r"a\.json:3 has something behind the end of the array"),
        (b'[{"text": "x"},\n\n{"other": 1}]', r"a\.json:3 has no field 'text'. Fields present: other"),
        (b'[{"text": "x"},\n3]', r"a\.json:2 is not an object"),
        (b'[{"text": "x"},\n{"text": "\xe9"}]', r"a\.json:2 is not UTF-8: byte 0xe9"),
        (b'[{"n": ' + b"9" * 5000 + b"}]", r"a\.json:1 is not JSON: Exceeds the limit"),
        (b'[{"n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]", r"a\.json:1 is not JSON: it is nested too deeply"),
    ],
)
def test_arrays_that_do_not_parse(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


def test_long_elements_of_an_array(tmp_path: Path) -> None:
    """Longer than what is read at once, with every cut inside a character or an escape."""
    texts = ["ü" * 1_500_000, "\\" * 700_001, "x"]
    content = json.dumps([{"text": text} for text in texts], ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(tmp_path / "a.json") == texts
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize("target", [20, 10**6])
@pytest.mark.parametrize(
    ("name", "good"), [("a.txt", b"fine\n"), ("a.jsonl", b'{"text": "fine"}\n'), ("a.csv", b"text\n")]
)
def test_not_utf8_names_file_and_line(name: str, good: bytes, target: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(good * 9 + good.replace(b"\n", b"\xe9\n") + good)
    with pytest.raises(UserError, match=rf"{name}:10 is not UTF-8: byte 0xe9 at column \d+.*iconv"):
        read(tmp_path, target=target)


@pytest.mark.parametrize("target", [20, 10**6])
def test_jsonl_lines_that_do_not_parse(target: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"text": "x"}\n'
    path.write_text(good * 5 + '{"text": "x"\n' + good)
    with pytest.raises(UserError, match=r"a\.jsonl:6 is not JSON: .* at column"):
        read(path, target=target)
    path.write_text(good * 2 + '["x"]\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3 is not an object"):
        read(path, target=target)
    path.write_text(good + '{"text": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: field 'text' holds a int, not text"):
        read(path, target=target)
    path.write_text(good + '{"n": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not JSON: Exceeds the limit \(4300 digits\)"):
        read(path, target=target)
    path.write_text(good + "[" * 10**5 + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not JSON: it is nested too deeply"):
        read(path, target=target)


def test_missing_field_names_those_present(tmp_path: Path) -> None:
    present = r"no field 'body'. Fields present: id, text. Choose one with --text_field"
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        WRITERS[name](tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}(:1)? has {present}"):
            read(tmp_path / name, field="body")
    as_arrow(tmp_path / "a.arrow")
    with pytest.raises(UserError, match=r"a\.arrow has no field 'body'. Fields present: text"):
        read(tmp_path / "a.arrow", field="body")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved has no field 'body'. Fields present: text"):
        read(tmp_path / "saved", field="body")


def test_csv_rows_of_another_width(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n"x\ny",1\nz\n')
    with pytest.raises(UserError, match=r"a\.csv:4 has 1 columns, the header has 2"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text('text,id\n"x"y,1\n')
    with pytest.raises(UserError, match=r"a\.csv:2 is not valid csv"):
        read(tmp_path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_damaged_compressed_files(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{ending}"
    data = os.urandom(100_000).hex().encode()
    path.write_bytes(COMPRESS[ending](data)[:-500])
    with pytest.raises(UserError, match=r"is damaged or not a \w+ file: .*([Tt]runcated|ended before)"):
        read(path)
    path.write_bytes(b"plain text that was never compressed\n")
    with pytest.raises(UserError, match=r"is damaged or not a (gzip|bz2|xz|zstd) file"):
        read(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file, or damaged"):
        read(tmp_path)
    (tmp_path / "b.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"b\.parquet\.gz: a compressed parquet file can't be read"):
        find_sources([str(tmp_path / "b.parquet.gz")])


def test_a_file_removed_after_planning(tmp_path: Path) -> None:
    as_txt(tmp_path / "a.txt")
    (source,) = find_sources([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt can't be read: .*No such file"):
        list(read_segment(source, Segment(0, 0, None, 0), ReadOptions("text", False), Records()))


def test_json_escapes_of_lone_surrogates_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x\ud800y"}) + "\n")
    assert read(tmp_path) == ["x\ud800y"]


BAD = {
    "a.txt": b"one\ntwo\n\xe9\nthree\n",
    "a.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"body": "x"}\n{"text": "three"}\n',
    "b.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"text": 3}\n{"text": "three"}\n',
    "c.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"text": "\xe9"}\n{"text": "three"}\n',
    "d.jsonl": b'{"text": "one"}\n{"text": "two"}\n["text"]\n{"text": "three"}\n',
    "e.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"text": "\n{"text": "three"}\n',
    "a.json": b'[{"text": "one"},\n{"text": "two"},\n{"body": "x"}, {"text": "three"}]',
    "a.csv": b"text,n\none,1\ntwo,2\nx\nthree,3\n",
    "a.tsv": b"text\tn\none\t1\ntwo\t2\nx\nthree\t3\n",
}


@pytest.mark.parametrize("target", [10, 10**6])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_stops_or_is_left_out_and_counted(name: str, target: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(UserError, match=rf"{name}:[34]\W"):
        read(tmp_path / name, target=target)
    with pytest.raises(UserError, match=r" \(before it, good: 2\)\. To leave .*: --on_bad_record skip$"):
        read(tmp_path / name, target=10**6)
    records = Records()
    assert read(tmp_path / name, target=target, skip_bad=True, records=records) == ["one", "two", "three"]
    assert (records.good, records.bad) == (3, 1)
    assert re.search(rf"{name}:[34]\W", records.first_bad)


def test_values_of_tables_that_are_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: field 'text' holds a int, not text"):
        read(tmp_path)
    records = Records()
    assert read(tmp_path, skip_bad=True, records=records) == []
    assert records.bad == 2


LONG = "x" * 101
TOO_LONG: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text(f"one\n{LONG}\ntwo\n"),
    "b.txt": lambda path: path.write_bytes(f"one\r{LONG}\rtwo\r".encode()),
    "c.txt": lambda path: path.write_text(
        f"one\n{'ü' * 51}\ntwo\n"
    ),  # 102 bytes, which may be cut inside one
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress(f"one\n{LONG}\ntwo\n".encode())),
    "a.jsonl": lambda path: tiny.write_jsonl(path, ["one", LONG, "two"]),
    "a.parquet": lambda path: pq.write_table(pa.table({"text": ["one", LONG, "two"]}), path),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_document_above_the_limit(name: str, tmp_path: Path) -> None:
    TOO_LONG[name](tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}.* is a document of more than 0\.0001 MB.*max_document_mb"):
        read(tmp_path / name, max_bytes=100)
    assert read(tmp_path / name, max_bytes=100, skip_bad=True) == ["one", "two"]
    assert len(read(tmp_path / name, max_bytes=150)) == 3


def test_files_above_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n" * 26)
    (tmp_path / "b.txt").write_text("one\n" * 25)
    with pytest.raises(UserError, match=r"a\.txt is a document of more than"):
        read(tmp_path, whole_files=True, max_bytes=100)
    assert len(read(tmp_path, whole_files=True, max_bytes=100, skip_bad=True)) == 1
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 3_000_000}]))
    with pytest.raises(UserError, match=r"a\.json:1 is a document of more than 1 MB"):
        read(tmp_path / "a.json", max_bytes=1_000_000)
    (tmp_path / "a.csv").write_text('text\n"' + "some\n" * 30 + '"\n')
    with pytest.raises(UserError, match=r"a\.csv:2 is not valid csv: field larger than field limit \(100\)"):
        read(tmp_path / "a.csv", max_bytes=100)


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
def test_line_breaks_where_reading_is_cut(limit: int, tmp_path: Path) -> None:
    """The lines that are within the limit, whatever stands around them."""
    generator = random.Random(limit)
    for _ in range(100):
        content = "".join(generator.choices("a\r\n", k=30)).encode() + b"a"
        (tmp_path / "a.txt").write_bytes(content)
        expected = [line for line in re.split(rb"\r\n|\r|\n", content) if len(line) <= limit]
        assert [line.encode() for line in read(tmp_path, max_bytes=limit, skip_bad=True)] == expected
