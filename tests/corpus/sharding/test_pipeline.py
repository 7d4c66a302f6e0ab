"""The sharder end to end: what is in the corpus, and that nothing but text and settings decides its bytes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from dga_scale.corpus.sharding.pipeline import ShardReport, shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import WORK_FOLDER, Corpus
from dga_scale.errors import UserError
from dga_scale.storage import atomic as files
from tests.helpers import tiny_corpora as tiny
from tests.helpers.ranks import REPOSITORY

SHARD_SIZE = 0.01
"""Megabytes: a few kilobytes of text make several input splits, document batches and shards."""


def settings(tokenizer: Path, **changes: object) -> ShardSettings:
    return replace(ShardSettings(str(tokenizer), sequence_length=32, shard_size=SHARD_SIZE), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs in several formats with repeats within and across files, and documents to drop."""
    folder = tmp_path_factory.mktemp("raw")
    documents = tiny.texts(900)
    tiny.write_jsonl(folder / "a.jsonl", documents[:500] + documents[100:150] + ["", "\x01"])
    (folder / "b.txt").write_text("\n".join(documents[400:800]) + "\n\n\x02\x03\n")
    tiny.write_jsonl(folder / "c.jsonl", documents[790:] + [documents[5]] * 7)
    return folder


@pytest.fixture(scope="module")
def expected(raw: Path, wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of ``raw``, made by one process without interruption."""
    output = tmp_path_factory.mktemp("expected") / "corpus"
    shard_corpus([str(raw)], output, settings(wordpiece))
    assert len(Corpus.open(output).manifest.shards) >= 3, "too few shards for what these tests are for"
    return output


def decoded(corpus: Corpus, tokenizer: Path) -> Counter[str]:
    """Documents of a corpus in "document" packing whose rows are long enough for each."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return Counter(loaded.decode(corpus.row(i), skip_special_tokens=True) for i in range(len(corpus)))


def test_all_documents_once_in_one_split(raw: Path, wordpiece: Path, tmp_path: Path) -> None:
    report = shard_corpus(
        [str(raw)],
        tmp_path / "corpus",
        settings(wordpiece, packing="document", sequence_length=512, validation_share=0.2),
    )
    train, held_out = Corpus.open(tmp_path / "corpus"), Corpus.open(tmp_path / "corpus" / "validation")
    loaded = AutoTokenizer.from_pretrained(wordpiece)
    reference = Counter(
        loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) for text in tiny.texts(900)
    )
    assert decoded(train, wordpiece) + decoded(held_out, wordpiece) == reference
    assert report.train.documents_read == 552 + 402 + 117
    assert report.train.dropped == {"empty": 2, "control_only": 2, "duplicates": 50 + 100 + 10 + 7}
    assert report.train.documents == len(train)
    assert 0.13 < len(held_out) / 900 < 0.27
    assert report.validation is not None
    assert report.validation.documents_read == report.train.documents_read


@pytest.mark.parametrize("name", ["wordpiece", "byte_bpe", "slow_sentencepiece"])
def test_chunks_hold_the_text_in_order(
    name: str, raw: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    shard_corpus([str(raw)], tmp_path / "corpus", settings(tokenizer, validation_share=0.0))
    corpus, loaded = Corpus.open(tmp_path / "corpus"), AutoTokenizer.from_pretrained(tokenizer)
    assert not (tmp_path / "corpus" / "validation").exists()
    special = {*loaded.all_special_ids} - {loaded.unk_token_id}
    stream = [i for row in corpus.rows(range(len(corpus))) for i in row.tolist() if i not in special]
    reference = [i for text in tiny.texts(900) for i in loaded(text, add_special_tokens=False)["input_ids"]]
    assert stream == reference

    # One short row a shard at most, its last; all others are full.
    ends = np.cumsum([shard.rows for shard in corpus.manifest.shards]) - 1
    assert set(np.flatnonzero(corpus.lengths != 32)) <= set(ends)
    assert corpus.manifest.causal is (name != "wordpiece")
    if name == "wordpiece":
        for row in corpus.rows([0, 1, len(corpus) - 1]):
            assert (row[0], row[-1]) == (loaded.cls_token_id, loaded.sep_token_id)


def test_columns(expected: Path, wordpiece: Path) -> None:
    corpus, loaded = Corpus.open(expected), AutoTokenizer.from_pretrained(wordpiece)
    rows = corpus.rows(range(len(corpus)))
    assert corpus.lengths.tolist() == [len(row) for row in rows]
    assert corpus.maskable.tolist() == [sum(i not in loaded.all_special_ids for i in row) for row in rows]
    manifest = corpus.manifest
    assert manifest.rows == len(rows)
    assert manifest.tokens == sum(map(len, rows))
    assert manifest.maskable == corpus.maskable.sum()


def test_datasets_opens_the_folder(expected: Path) -> None:
    corpus = Corpus.open(expected)
    loaded = datasets.load_from_disk(str(expected))
    assert loaded["input_ids"][:] == [row.tolist() for row in corpus.rows(range(len(corpus)))]
    assert loaded["length"][:] == corpus.lengths.tolist()
    assert len(datasets.load_from_disk(str(expected / "validation"))) > 0


def test_duplicates_fall_on_one_side_and_can_be_kept(raw: Path, wordpiece: Path, tmp_path: Path) -> None:
    chosen = settings(wordpiece, packing="document", sequence_length=512, validation_share=0.2)
    report = shard_corpus([str(raw)], tmp_path / "kept", replace(chosen, keep_duplicates=True))
    assert report.train.dropped["duplicates"] == 0
    train = decoded(Corpus.open(tmp_path / "kept"), wordpiece)
    held_out = decoded(Corpus.open(tmp_path / "kept" / "validation"), wordpiece)
    assert (train + held_out).total() == 552 + 402 + 117 - 4
    assert (train + held_out).most_common(1)[0][1] == 8
    assert not train.keys() & held_out.keys()


def test_the_split_of_a_document_does_not_depend_on_the_others(wordpiece: Path, tmp_path: Path) -> None:
    documents = tiny.texts(300)
    chosen = settings(wordpiece, packing="document", sequence_length=512, validation_share=0.1)
    held_out = []
    for name, part in (("few", documents[::2]), ("all", documents)):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", part)
        shard_corpus([str(path)], tmp_path / name, chosen)
        held_out.append(decoded(Corpus.open(tmp_path / name / "validation"), wordpiece))
    assert held_out[0].keys() < held_out[1].keys()
    shard_corpus([str(path)], tmp_path / "seed", replace(chosen, seed=1))
    assert decoded(Corpus.open(tmp_path / "seed" / "validation"), wordpiece).keys() != held_out[1].keys()


def test_few_documents_still_hold_one_out(wordpiece: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.texts(3))
    report = shard_corpus([str(path)], tmp_path / "corpus", settings(wordpiece, validation_share=1e-9))
    assert report.validation is not None
    assert (report.train.documents, report.validation.documents) == (2, 1)


def test_long_and_short_units_give_one_corpus(raw: Path, wordpiece: Path, tmp_path: Path) -> None:
    """Duplicates are the same documents wherever the document batches are cut."""
    chosen = settings(wordpiece, packing="document", sequence_length=512, validation_share=0.1)
    kept = []
    for size in (0.003, 0.01, 16):
        shard_corpus([str(raw)], tmp_path / str(size), replace(chosen, shard_size=size))
        kept.append(decoded(Corpus.open(tmp_path / str(size)), wordpiece))
    assert kept[0] == kept[1] == kept[2]


# --- the same bytes, whoever does the work and however often it is interrupted ---


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers(num_workers: int, raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    shard_corpus([str(raw)], tmp_path / "corpus", settings(wordpiece), num_workers=num_workers)
    assert contents(tmp_path / "corpus") == contents(expected)


def in_fork(*arguments: object, **options: object) -> multiprocessing.process.BaseProcess:
    """Start ``shard_corpus`` in a forked process, which costs no imports."""
    process = multiprocessing.get_context("fork").Process(target=shard_corpus, args=arguments, kwargs=options)
    process.start()
    return process


def test_parts_side_by_side(raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    parts = [in_fork([str(raw)], output, settings(wordpiece), array_task=(i, 3)) for i in range(3)]
    for part in parts:
        part.join(60)
        assert part.exitcode == 0
    assert contents(output) == contents(expected)


def test_parts_one_after_the_other(raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    """Where the cluster starts them one by one, the first does what nobody else does."""
    output = tmp_path / "corpus"
    first = shard_corpus([str(raw)], output, settings(wordpiece), array_task=(1, 2), array_task_patience=0.2)
    assert contents(output) == contents(expected)
    assert first.text_bytes > 0
    late = shard_corpus([str(raw)], output, settings(wordpiece), array_task=(0, 2), array_task_patience=0.2)
    assert late.text_bytes == 0
    assert contents(output) == contents(expected)


def test_a_killed_array_task_is_replaced_by_the_others(
    raw: Path, wordpiece: Path, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    victim = in_fork_killed_at(5, [str(raw)], output, settings(wordpiece), array_task=(0, 2))
    assert victim.exitcode == -signal.SIGKILL
    shard_corpus([str(raw)], output, settings(wordpiece), array_task=(1, 2), array_task_patience=0.2)
    assert contents(output) == contents(expected)


def in_fork_killed_at(
    count: int, *arguments: object, **options: object
) -> multiprocessing.process.BaseProcess:
    """``shard_corpus`` in a process that kills itself, as kill -9 does, before its n-th file is in place."""

    def run() -> None:
        left = count
        rename = os.replace

        def replace_or_die(source: object, target: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)  # type: ignore[arg-type]

        files.os.replace = replace_or_die  # type: ignore[assignment]
        shard_corpus(*arguments, **options)  # type: ignore[arg-type]

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process


def test_killed_before_every_file(raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    """The first attempt is killed before its first file is in place, the second before its second, ..."""
    output = tmp_path / "corpus"
    attempts = 0
    while not (output / "manifest.json").exists():
        if (output / WORK_FOLDER / "plan.json").exists():
            with pytest.raises(UserError, match=r"an unfinished corpus .* Run the same"):
                Corpus.open(output)
        attempts += 1
        in_fork_killed_at(attempts, [str(raw)], output, settings(wordpiece))
    assert attempts > 8
    shard_corpus([str(raw)], output, settings(wordpiece))
    assert contents(output) == contents(expected)


def test_killed_at_random_moments(raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    started = time.monotonic()
    in_fork([str(raw)], tmp_path / "timed", settings(wordpiece)).join()
    duration = time.monotonic() - started
    generator = random.Random(4)
    for _ in range(6):
        process = in_fork([str(raw)], output, settings(wordpiece))
        process.join(generator.uniform(0, duration))
        process.kill()
        process.join()
    shard_corpus([str(raw)], output, settings(wordpiece))
    assert contents(output) == contents(expected)


def test_killed_with_its_workers_on_the_command_line(
    raw: Path, wordpiece: Path, expected: Path, tmp_path: Path
) -> None:
    """kill -9 of the parent ends the workers too; the same command resumes."""
    big = tmp_path / "big.jsonl"
    tiny.write_jsonl(big, tiny.texts(15_000))
    command = [sys.executable, "tools/shard_corpus.py", str(big), "--tokenizer", str(wordpiece)]
    command += ["--output", str(tmp_path / "corpus"), "--sequence_length", "32", "--num_workers", "4"]
    command += ["--shard_size", "0.2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    markers = tmp_path / "corpus" / WORK_FOLDER
    while not list(markers.glob("train-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    # A shard is done once its marker is there: the kill may fall between a shard's data and its marker.
    names = [marker.name.replace("train-", "data-") for marker in markers.glob("train-*.json")]
    shards = [(tmp_path / "corpus" / name).with_suffix(".arrow") for name in names]
    done = {path: path.stat().st_mtime_ns for path in shards}
    chosen = settings(wordpiece, shard_size=0.2)
    report = shard_corpus([str(big)], tmp_path / "corpus", chosen)
    assert report.resumed
    assert done
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    shard_corpus([str(big)], tmp_path / "reference", chosen)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "reference")


def test_finished_is_finished(raw: Path, wordpiece: Path, expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    shutil.copytree(expected, output)
    (output / WORK_FOLDER / "scratch").mkdir(parents=True)  # killed while it tidied up
    report: ShardReport = shard_corpus([str(raw)], output, settings(wordpiece))
    assert report.text_bytes == 0
    assert contents(output) == contents(expected)
    assert not (output / WORK_FOLDER).exists()


@pytest.mark.parametrize("damage", ["flipped", "gone", "validation"])
def test_a_finished_corpus_that_is_damaged_is_made_again(
    damage: str,
    raw: Path,
    wordpiece: Path,
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command that an error of training advises."""
    output = Path(shutil.copytree(expected, tmp_path / "corpus"))
    shard = output / "data-00001.arrow"
    if damage == "flipped":
        content = shard.read_bytes()
        shard.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    elif damage == "gone":
        shard.unlink()
    else:
        shutil.rmtree(output / "validation")
    report = shard_corpus([str(raw)], output, settings(wordpiece))
    assert report.text_bytes > 0
    assert "note: the corpus is made again: " in capsys.readouterr().err
    assert contents(output) == contents(expected)


# --- what is refused ---


def test_output_of_another_corpus(
    raw: Path, wordpiece: Path, byte_bpe: Path, expected: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"sequence_length": 64}, r"holds another corpus: sequence_length 32, now 64\. Choose another"),
        ({"packing": "document", "seed": 3}, r"packing 'chunk', now 'document'; seed 0, now 3"),
    ):
        with pytest.raises(UserError, match=message):
            shard_corpus([str(raw)], expected, settings(wordpiece, **changes))
    with pytest.raises(UserError, match=r"tokenizer_hash"):
        shard_corpus([str(raw)], expected, settings(byte_bpe))
    tiny.write_jsonl(tmp_path / "d.jsonl", ["one"])
    a, b, c, d = *(str(raw / name) for name in ("a.jsonl", "b.txt", "c.jsonl")), str(tmp_path / "d.jsonl")
    for inputs, message in (
        ([a], rf"holds another corpus: input {b} is missing\."),
        ([a, c, b], r"holds another corpus: the same inputs in another order"),
        ([d, a, b, c], rf"holds another corpus: input {d} is new\."),
    ):
        with pytest.raises(UserError, match=message):
            shard_corpus(inputs, expected, settings(wordpiece))


def test_inputs_that_were_changed_since(wordpiece: Path, tmp_path: Path) -> None:
    """A change in the middle of a file, of the same length, which neither size nor ends tell."""
    path, output = tmp_path / "a.txt", tmp_path / "corpus"
    text = "".join(f"line {number} of a text about stones\n" for number in range(20_000))
    path.write_text(text)
    chosen = settings(wordpiece, shard_size=16)
    shard_corpus([str(path)], output, chosen)
    os.utime(path, ns=(0, 0))
    assert shard_corpus([str(path)], output, chosen).text_bytes == 0, "a copy is the same corpus"
    path.write_text(text.replace("line 10000 of", "lime 10000 of"))
    with pytest.raises(UserError, match=r"holds another corpus: input .*a\.txt was changed"):
        shard_corpus([str(path)], output, chosen)
    datasets.Dataset.from_dict({"text": text.splitlines()}).save_to_disk(tmp_path / "saved")
    shard_corpus([str(tmp_path / "saved")], tmp_path / "second", chosen)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"line 10000 of", b"lime 10000 of"))
    with pytest.raises(UserError, match=r"holds another corpus: input .*saved was changed"):
        shard_corpus([str(tmp_path / "saved")], tmp_path / "second", chosen)


def test_unfinished_work_is_kept_as_far_as_it_is_the_same(
    raw: Path, wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an error told to do is done in the same folder, and gives the bytes of a new one."""
    folder = tmp_path / "raw"
    shutil.copytree(raw, folder)
    bad = folder / "c.jsonl"
    good = bad.read_text()
    bad.write_text(good + '{"body": "x"}\n')
    output, chosen = tmp_path / "corpus", settings(wordpiece)
    with pytest.raises(UserError, match=r"c\.jsonl:\d+ has no field 'text'.*--on_bad_record skip"):
        shard_corpus([str(folder)], output, chosen)
    read = {path: path.stat().st_mtime_ns for path in (output / WORK_FOLDER).glob("input-*.json")}
    assert read
    # Another tokenisation needs no text to be read again.
    with pytest.raises(UserError, match=r"c\.jsonl:\d+ has no field"):
        shard_corpus([str(folder)], output, replace(chosen, sequence_length=64))
    note = capsys.readouterr().err
    assert f"was begun with sequence_length 32, now 64: of {len(read) + 1} parts of the input" in note
    bad.write_text(good)
    shard_corpus([str(folder)], tmp_path / "reference", chosen)
    in_fork_killed_at(20, [str(folder)], output, chosen)  # some shards are written, and then not wanted
    assert list(output.glob("data-*"))
    assert read == {path: path.stat().st_mtime_ns for path in read}
    shard_corpus([str(folder)], output, replace(chosen, shard_size=0.02))
    shard_corpus([str(folder)], tmp_path / "larger", replace(chosen, shard_size=0.02))
    assert contents(output) == contents(tmp_path / "larger")
    assert contents(output) != contents(tmp_path / "reference")


def test_killed_while_other_settings_take_over(
    raw: Path, wordpiece: Path, expected: Path, tmp_path: Path
) -> None:
    """Killed before its plan is in place, it leaves nothing that the former settings would take up."""
    output = tmp_path / "corpus"
    in_fork_killed_at(3, [str(raw)], output, settings(wordpiece))  # with tokenizer.json and plan.json
    in_fork_killed_at(2, [str(raw)], output, settings(wordpiece, sequence_length=64))
    shard_corpus([str(raw)], output, settings(wordpiece))
    assert contents(output) == contents(expected)


def test_another_field_in_a_folder_that_was_begun(wordpiece: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(50), field="reviewText")
    with pytest.raises(UserError, match=r"Fields present: id, reviewText\. Choose one with --text_field$"):
        shard_corpus([str(path)], tmp_path / "corpus", settings(wordpiece))
    report = shard_corpus([str(path)], tmp_path / "corpus", settings(wordpiece, text_field="reviewText"))
    assert report.train.documents_read == 50


def test_bad_records_are_counted(wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(60))
    path.write_text(path.read_text() + '{"text": 3}\n{"body": "x"}\n')
    report = shard_corpus([str(path)], tmp_path / "corpus", settings(wordpiece, on_bad_record="skip"))
    assert report.train.documents_read == 62
    assert report.train.dropped == {"empty": 0, "control_only": 0, "duplicates": 0, "bad": 2}
    assert "note: 2 bad records were left out. The first: " in capsys.readouterr().err
    path.write_text('{"text": 3}\n{"body": "x"}\n')
    with pytest.raises(UserError, match=r"no document with text in the inputs: 2 read, .*, 2 bad"):
        shard_corpus([str(path)], tmp_path / "none", settings(wordpiece, on_bad_record="skip"))


THAI = "ภาษาไทยเป็นภาษาที่ใช้ในประเทศ "


def test_text_that_the_tokenizer_cannot_write(
    wordpiece: Path, byte_bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown tokens are counted, and text of mostly these is refused, before any work or at its end."""
    (tmp_path / "thai.txt").write_text("".join(f"{THAI * 20}{number}\n" for number in range(50)))
    tiny.write_jsonl(
        tmp_path / "mixed.jsonl", [*tiny.texts(90, words=(9, 10)), *[f"{THAI} {n}" for n in range(50)]]
    )
    unknown = r"\d\d% of the tokens of the first 23 documents are unknown to the tokenizer of .*wordpiece"
    with pytest.raises(UserError, match=unknown):
        shard_corpus([str(tmp_path / "thai.txt")], tmp_path / "thai", settings(wordpiece))
    assert not (tmp_path / "thai").exists()

    chosen = settings(wordpiece, validation_share=0.0, keep_duplicates=True)
    report = shard_corpus([str(tmp_path / "mixed.jsonl")], tmp_path / "mixed", chosen)
    corpus, unk = Corpus.open(tmp_path / "mixed"), AutoTokenizer.from_pretrained(wordpiece).unk_token_id
    found = sum(int((row == unk).sum()) for row in corpus.rows(range(len(corpus))))
    assert report.train.unknown == found == 50
    assert sum(shard.unknown for shard in corpus.manifest.shards) == found

    report = shard_corpus([str(tmp_path / "thai.txt")], tmp_path / "bytes", settings(byte_bpe))
    assert report.train.unknown == 0
    monkeypatch.setattr("dga_scale.corpus.sharding.begin._FIRST_CHARACTERS", 100)
    (tmp_path / "start.txt").write_text("".join(f"{text}\n" for text in tiny.texts(5)))
    with pytest.raises(UserError, match=r"\d\d% of the tokens of the text are unknown"):
        shard_corpus(
            [str(tmp_path / "start.txt"), str(tmp_path / "thai.txt")], tmp_path / "end", settings(wordpiece)
        )


def test_output_with_other_files(raw: Path, wordpiece: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not empty and holds no corpus: thesis\.tex\. Choose a new"):
        shard_corpus([str(raw)], tmp_path / "corpus", settings(wordpiece))
    with pytest.raises(UserError, match=r"--output .* is a file\. Choose a new folder"):
        shard_corpus([str(raw)], tmp_path / "corpus" / "thesis.tex", settings(wordpiece))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sequence_length": 3}, {}, r"--sequence_length 3: must be at least 8"),
        ({"validation_share": 1.0}, {}, r"--validation_share 1.0: must be from 0 to below 1"),
        ({"shard_size": 0}, {}, r"--shard_size 0: must be above 0"),
        ({"seed": -1}, {}, r"--seed -1: must be 0 or more"),
        ({"packing": "bins"}, {}, r"--packing bins: must be one of chunk, document"),
        ({"document": "page"}, {}, r"--document page: must be one of line, file"),
        ({"on_bad_record": "cry"}, {}, r"--on_bad_record cry: must be one of stop, skip"),
        ({"max_document_mb": 0}, {}, r"--max_document_mb 0: must be above 0"),
        ({}, {"num_workers": 0}, r"--num_workers 0: must be at least 1"),
        ({}, {"array_task": (4, 4)}, r"--array_task 4/4: count from 0"),
    ],
)
def test_settings_out_of_range(
    changes: dict, options: dict, message: str, raw: Path, wordpiece: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        shard_corpus([str(raw)], tmp_path / "corpus", settings(wordpiece, **changes), **options)
    assert not (tmp_path / "corpus").exists()


def test_nothing_to_train_on(wordpiece: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n\x01\n")
    with pytest.raises(
        UserError, match=r"no document with text in the inputs: 3 read, 2 of them empty, 1 of"
    ):
        shard_corpus([str(tmp_path / "blank.txt")], tmp_path / "blank", settings(wordpiece))
    (tmp_path / "one.txt").write_text("only one\n")
    with pytest.raises(UserError, match=r"nothing is left to train on: 1 documents read, .* 1 held out"):
        shard_corpus([str(tmp_path / "one.txt")], tmp_path / "one", settings(wordpiece))


@pytest.mark.parametrize("num_workers", [1, 4])
def test_an_error_in_the_input_can_be_corrected(num_workers: int, wordpiece: Path, tmp_path: Path) -> None:
    """The error of a worker process arrives as it is; the corrected input is another corpus."""
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(50))
    path.write_text(path.read_text() + "{broken\n")
    chosen = settings(wordpiece)
    with pytest.raises(UserError, match=r"a\.jsonl:51 is not JSON"):
        shard_corpus([str(path)], tmp_path / "corpus", chosen, num_workers=num_workers)


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_full_disk(num_workers: int, wordpiece: Path, small_disk: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(3000))
    chosen = settings(wordpiece, shard_size=0.02)
    output = small_disk / "corpus"
    with pytest.raises(
        UserError, match=rf"the disk of {output} is full \(0\.\d MB free\).*Finished work is kept"
    ):
        shard_corpus([str(path)], output, chosen, num_workers=num_workers)
    finished = list((output / WORK_FOLDER).glob("input-*.json"))
    assert finished
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    report = shard_corpus([str(path)], output, chosen)
    assert report.resumed
    shard_corpus([str(path)], tmp_path / "reference", chosen)
    assert contents(output) == contents(tmp_path / "reference")


def test_work_files_are_json(raw: Path, wordpiece: Path, tmp_path: Path) -> None:
    """State is plain data: what an interrupted run leaves can be read without this package."""
    in_fork_killed_at(12, [str(raw)], tmp_path / "corpus", settings(wordpiece))
    plan = json.loads((tmp_path / "corpus" / WORK_FOLDER / "plan.json").read_text())
    assert plan["settings"]["sequence_length"] == 32
    assert [Path(source["path"]).name for source in plan["sources"]] == ["a.jsonl", "b.txt", "c.jsonl"]
