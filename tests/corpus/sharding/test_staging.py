"""Document batches and duplicates, against a plain dictionary."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from dga_scale.corpus.sharding import staging as staging
from dga_scale.corpus.sharding.staging import (
    Plan,
    ShardSettings,
    Work,
    document_hash,
    duplicates_of,
    find_duplicates,
    read_document_batch,
    read_input_split,
)
from dga_scale.errors import UserError
from dga_scale.storage.atomic import write_json
from tests.helpers import tiny_corpora as tiny


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """An empty work folder."""
    work = Work(tmp_path / "corpus" / ".sharding")
    work.folder.mkdir(parents=True)
    staging.load_plan.cache_clear()
    staging.load_document_batches.cache_clear()
    return work


def read_all(work: Work, documents: list[str], tmp_path: Path, shard_size: float) -> list[dict]:
    """Stage ``documents``: the document batches."""
    path = tiny.write_jsonl(tmp_path / "a.jsonl", documents)
    plan = Plan.make([str(path)], ShardSettings("unused", shard_size=shard_size))
    write_json(work.plan_file, plan.to_json(), work.scratch)
    document_batches = []
    for number in range(len(plan.input_splits)):
        read_input_split(work.folder, number)
        document_batches += json.loads(work.input_split(plan.keys[number]).read_text())["document_batches"]
    write_json(work.document_batches_file, document_batches, work.scratch)
    return document_batches


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_the_first_occurrence_stays(partitions: int, work: Work, tmp_path: Path) -> None:
    texts = tiny.texts(300)
    generator = np.random.default_rng(0)
    documents = [texts[i] for i in generator.integers(0, 300, 1500)]
    document_batches = read_all(work, documents, tmp_path, shard_size=0.005)
    assert len(document_batches) > 5
    for number in range(partitions):
        find_duplicates(work.folder, number, partitions)
    kept = []
    for index, document_batch in enumerate(document_batches):
        staged = [
            text
            for texts, _ in read_document_batch(work, document_batch["name"])
            for text in texts.to_pylist()
        ]
        repeats = set(duplicates_of(work, index, partitions).tolist())
        kept += [text for place, text in enumerate(staged) if place not in repeats]
    assert kept == list(dict.fromkeys(documents))


def test_one_document_repeated_does_not_fill_the_memory(work: Work, tmp_path: Path) -> None:
    """A document batch lists each document once, so a partition holds it at most once a document batch."""
    document_batches = read_all(work, ["the same"] * 5000 + ["another"], tmp_path, shard_size=0.005)
    for document_batch in document_batches:
        assert document_batch["documents"] <= 2
        assert np.load(work.hashes(document_batch["name"])).shape == (3, document_batch["documents"])


def test_units_end_after_many_short_documents(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_DOCUMENTS", 40)
    document_batches = read_all(work, tiny.texts(100), tmp_path, shard_size=16)
    assert [document_batch["documents"] for document_batch in document_batches] == [40, 40, 20]


def test_hashes_spread_evenly() -> None:
    halves = np.frombuffer(
        b"".join(document_hash(text.encode(), 0) for text in tiny.texts(4000)), dtype="<u8"
    )
    for half in (halves[::2], halves[1::2]):
        counts = np.histogram(half / 2.0**64, bins=10, range=(0, 1))[0]
        assert abs(counts - 400).max() < 100
    assert document_hash(b"a", 0) != document_hash(b"a", 1)


@pytest.mark.parametrize("change", ["content", "time", "gone"])
def test_a_source_that_changes_while_it_is_read(change: str, work: Work, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(10))
    plan = Plan.make([str(path)], ShardSettings("unused"))
    write_json(work.plan_file, plan.to_json(), work.scratch)
    match change:
        case "content":
            tiny.write_jsonl(path, tiny.texts(11))
        case "time":
            os.utime(path, ns=(0, plan.sources[0].modified + 1))
        case "gone":
            path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl (was changed while it was read\. Wait|can't be read)"):
        read_input_split(work.folder, 0)
    assert not work.input_split(plan.keys[0]).exists()


def test_the_plan_of_many_files_takes_linear_time(tmp_path: Path) -> None:
    calls = []
    for count in (200, 400):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text("text\n")
        calls.append(0)

        def profile(_frame: object, event: str, _argument: object) -> None:
            calls[-1] += event == "call"

        sys.setprofile(profile)
        Plan.make([str(folder)], ShardSettings("unused"))
        sys.setprofile(None)
    assert calls[1] < 2.2 * calls[0]
