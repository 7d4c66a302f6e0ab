"""Every input format and compression gives the same documents; every bad input a clear error."""

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.sources import ReadOptions, Segment, read_segment, segments
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny

DOCUMENTS = tiny.texts(60)
SMALL = 400
"""Bytes of a segment, so that these files are cut in many."""


def read(
    *inputs: Path | str, field: str = "text", whole_files: bool = False, target: int = SMALL
) -> list[str]:
    options = ReadOptions(text_field=field, whole_files=whole_files)
    sources = find_sources(map(str, inputs))
    return [
        text
        for number, source in enumerate(sources)
        for segment in segments(number, source, options, target)
        for text in read_segment(source, segment, options)
    ]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def as_txt(path: Path) -> None:
    path.write_text("\n".join(DOCUMENTS) + "\n")


def as_csv(path: Path, delimiter: str = ",") -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
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
    "a.tsv": lambda path: as_csv(path, "\t"),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == DOCUMENTS
    assert read(tmp_path) == DOCUMENTS
    assert read(tmp_path / "a.*", target=10**9) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressions(name: str, ending: str, tmp_path: Path) -> None:
    plain = tmp_path / name
    WRITERS[name](plain)
    data = plain.read_bytes()
    plain.unlink()
    compress = gzip.compress if ending == ".gz" else zstd
    # Two members in one file, as `cat a.gz b.gz` makes.
    half = len(data) // 2
    (tmp_path / (name + ending)).write_bytes(compress(data[:half]) + compress(data[half:]))
    assert read(tmp_path) == DOCUMENTS


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
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    assert read(tmp_path / "a.json") == DOCUMENTS
    (tmp_path / "a.strange").write_text("?")
    with pytest.raises(UserError, match=r"a\.strange: `datasets` can't read it .* Endings read here: \.txt"):
        read(tmp_path / "a.strange")


@pytest.mark.parametrize("target", [1, 7, 10, 11, 50, 333, 10**6])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_cut_anywhere_no_line_is_lost_or_read_twice(target: int, line_break: bytes, tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + "ünder".encode(), b"", b"x", b"yy" * 40, b"z"]
    (tmp_path / "a.txt").write_bytes(line_break.join(lines))
    assert read(tmp_path / "a.txt", target=target) == ["ünder", "", "x", "yy" * 40, "z"]


def test_order_hidden_files_and_repeats(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/9.txt", ".hidden/0.txt", "a/.swp.txt", "a/notes.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/9.txt", "b/1.txt", "b/2.txt"]
    assert read(tmp_path / "b", tmp_path) == ["b/1.txt", "b/2.txt", "a/9.txt"]
    assert read(f"{tmp_path}/**/*.txt") == ["a/9.txt", "b/1.txt", "b/2.txt"]


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


def test_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input .*nothing\.txt: no such file or folder"):
        find_sources([str(tmp_path / "nothing.txt")])
    with pytest.raises(UserError, match=r"input .*\*\.gz: pattern matches no file"):
        find_sources([str(tmp_path / "*.gz")])
    with pytest.raises(UserError, match=r"input folder .* holds no text files \(searched for \.txt"):
        find_sources([str(tmp_path)])


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt is empty \(0 bytes\)"):
        read(tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is empty once decompressed"):
        read(tmp_path / "b.jsonl.gz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt can't be read"):
        read(tmp_path)


@pytest.mark.parametrize("target", [20, 10**6])
@pytest.mark.parametrize(
    ("name", "good"), [("a.txt", b"fine\n"), ("a.jsonl", b'{"text": "fine"}\n'), ("a.csv", b"text\n")]
)
def test_not_utf8_names_file_and_line(name: str, good: bytes, target: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(good * 9 + good.replace(b"\n", b"\xe9\n") + good)
    with pytest.raises(UserError, match=rf"{name}:10 is not UTF-8: byte 0xe9 at column \d+.*iconv"):
        read(tmp_path, target=target)


def test_utf16_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.txt:1 is not UTF-8"):
        read(tmp_path, whole_files=True)


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


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compressed_files(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{ending}"
    data = os.urandom(5000).hex().encode()
    path.write_bytes((gzip.compress if ending == ".gz" else zstd)(data)[:-500])
    with pytest.raises(UserError, match=r"is damaged or not a (gzip|zstd) file: .*[Tt]runcated"):
        read(path)
    path.write_bytes(b"plain text that was never compressed\n")
    with pytest.raises(UserError, match=r"is damaged or not a (gzip|zstd) file"):
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
        list(read_segment(source, Segment(0, 0, None, 0), ReadOptions("text", False)))


def test_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    seen = set()
    for content in ("abc", "abd", "abcd"):
        path.write_text(content)
        seen.add(find_sources([str(path)])[0].fingerprint)
    assert len(seen) == 3


def test_json_escapes_of_lone_surrogates_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x\ud800y"}) + "\n")
    assert read(tmp_path) == ["x\ud800y"]
