"""What is held of a line while it is read: counted, not timed."""

import gzip
import itertools
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from dga_scale.corpus.reading import files
from dga_scale.corpus.reading.files import Segment, lines
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment
from dga_scale.corpus.sharding.staging import _record_batch
from dga_scale.errors import UserError

LINE = b"the model of language adapts " * 300_000  # 8.7 MB
MB = 1_000_000


def written(path: Path, content: bytes) -> files.Source:
    pack: Callable[[bytes], bytes] = {
        ".gz": lambda plain: gzip.compress(plain, 1), ".zst": zstandard.compress
    }.get(path.suffix, bytes)  # fmt: skip
    path.write_bytes(pack(content))
    (source,) = find_sources([str(path)])
    return source


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.txt", "cr.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz"])
def test_a_long_line_is_held_once_when_it_is_read_and_beside_its_bytes_before(
    name: str, tmp_path: Path, traced: None
) -> None:
    content = json.dumps({"text": LINE.decode()}).encode() if "jsonl" in name else LINE
    source = written(tmp_path / name, content + (b"\rnext\n" if name == "cr.txt" else b"\n"))
    del content
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    texts = read_segment(source, Segment.whole(source), ReadOptions("text", whole_files=False), Records())
    text = next(texts)
    now, peak = (size - before for size in tracemalloc.get_traced_memory())
    assert len(text) >= len(LINE) - 1
    assert now < 1.3 * len(LINE)
    # JSON is text before it is a record: its bytes, that text, and the record's.
    assert peak < (3.2 if "jsonl" in name else 2.2) * len(LINE) + 2 * MB  # of blocks


def test_a_line_above_the_limit_is_not_read_into_memory(tmp_path: Path, traced: None) -> None:
    source = written(tmp_path / "a.txt.gz", LINE * 3)
    options = ReadOptions("text", whole_files=False, max_bytes=4 * MB)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with pytest.raises(UserError, match="is a document of more than 4 MB"):
        list(read_segment(source, Segment.whole(source), options, Records()))
    assert tracemalloc.get_traced_memory()[1] - before < 10 * MB


def test_a_file_whose_lines_end_otherwise_is_not_held(tmp_path: Path, traced: None) -> None:
    source = written(tmp_path / "a.txt", (b"a line of an old machine" * 20 + b"\r") * 25_000)  # 12 MB
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    assert sum(1 for _ in lines(source, Segment.whole(source), 256 * MB)) == 25_000
    assert tracemalloc.get_traced_memory()[1] - before < 6 * MB


@pytest.mark.parametrize("buffer", [2, 3, 7])
def test_lines_are_those_of_a_plain_split_wherever_blocks_end(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, ends in enumerate(itertools.product(["\r", "\n", "\r\n", ""], repeat=3)):
        content = "".join(f"line{end}" for end in ends) + ends[0] + "x" * number
        source = written(tmp_path / "a.txt", content.encode())
        with monkeypatch.context() as small:
            small.setattr(files, "_BUFFER", buffer)
            found = [bytes(line).decode() for _, line in lines(source, Segment.whole(source), 1000)]
        expected = re.split("\r\n|\r|\n", content)
        assert found == (expected if expected[-1] else expected[:-1]), repr(content)


def test_documents_are_staged_without_a_copy_of_a_long_one(traced: None) -> None:
    texts, hashes = ["naïve".encode(), b"", b"a line"], [bytes(range(n, n + 16)) for n in range(3)]
    batch = _record_batch(texts, hashes)
    batch.validate(full=True)
    assert batch.column("text").equals(pa.array([t.decode() for t in texts], pa.large_string()))
    tracemalloc.reset_peak()
    before, of_arrow = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
    batch = _record_batch([LINE], hashes[:1])
    assert tracemalloc.get_traced_memory()[1] - before < MB
    assert pa.total_allocated_bytes() - of_arrow < MB
    assert batch.column("text")[0].as_py() == LINE.decode()
