"""Examples found in text, against a naive loop; documents excluded from a corpus, whoever does the work."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dga_scale.corpus.cli import main
from dga_scale.corpus.reading.overlap import GRAM, Overlap, found_in_text, words
from dga_scale.corpus.reading.sources import ReadOptions
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError
from tests.corpus.sharding.test_pipeline import SHARD_SIZE, contents, decoded, in_fork_killed_at
from tests.helpers import tiny_corpora as tiny

Texts = list[tuple[str, ...]]


def write_examples(path: Path, examples: Texts) -> str:
    names = ("text", "text_pair")
    lines = [json.dumps({**dict(zip(names, texts, strict=False)), "label": "x"}) for texts in examples]
    path.write_text("\n".join([*lines, ""]))
    return str(path)


def naive(document: str, example: tuple[str, ...]) -> bool:
    """Every run of eight words of the one looked for in the other; texts without brackets."""
    mine = re.findall(r"\w+", document.lower())
    theirs = [re.findall(r"\w+", text.lower()) for text in example]
    if max(map(len, theirs)) < GRAM:
        return mine == max(theirs, key=len)
    runs = {tuple(mine[n : n + GRAM]) for n in range(len(mine) - GRAM + 1)}
    return any(tuple(part[n : n + GRAM]) in runs for part in theirs for n in range(len(part) - GRAM + 1))


def few_words(draw: random.Random, longest: int) -> str:
    """A text over three words, so that runs of eight are often shared and more often nearly."""
    return " ".join(draw.choices(["a", "B,", "c"], k=draw.randint(1, longest)))


def test_the_same_as_a_naive_loop(tmp_path: Path):
    draw = random.Random(3)
    examples = [
        (few_words(draw, 14), few_words(draw, 10))[: draw.choice([1, 2])] for _ in range(60)
    ]  # fmt: skip
    documents = [few_words(draw, 150) for _ in range(80)] + [few_words(draw, 6) for _ in range(80)]
    files = [
        write_examples(tmp_path / name, part) for name, part in (("a", examples[:25]), ("b", examples[25:]))
    ]
    overlap = Overlap(files)
    expected = [[n for n, example in enumerate(examples) if naive(d, example)] for d in documents]
    assert [overlap.find(document).tolist() for document in documents] == expected
    found = {number for numbers in expected for number in numbers}
    assert 10 < len(found) < 60, "too easy"
    assert sum(map(bool, expected)) < len(documents)
    counts = [sum(number < 25 for number in found), sum(number >= 25 for number in found)]
    assert overlap.counts(found) == counts
    (tmp_path / "text.txt").write_text("\n".join(documents))
    assert found_in_text(overlap, [str(tmp_path / "text.txt")], ReadOptions("text", False)) == counts


def test_what_a_word_is():
    assert words("Androgen-receptor << EMP >> -LRB- 1 -RRB- don't") == [
        "androgen",
        "receptor",
        "emp",
        "1",
        "don",
        "t",
    ]
    assert words("ﬁne STRASSE straße") == ["fine", "strasse", "strasse"]
    assert words("深層 learning です") == ["深", "層", "learning", "で", "す"]
    assert words(" -- … ") == []


def test_markers_and_case_do_not_hide_an_example(tmp_path: Path):
    text = "Recognition of [[ proper nouns ]] in << Japanese text >> has been -LRB- studied -RRB- ."
    overlap = Overlap([write_examples(tmp_path / "a", [(text,), ("...", "!")])])
    assert overlap.find("The recognition of proper nouns in Japanese text has long been").tolist() == [0]
    assert (
        overlap.find("recognition of proper nouns in Japanese newspaper text has been studied").tolist() == []
    )
    assert overlap.find("!").tolist() == []


@pytest.mark.parametrize(
    "line",
    ["{broken", '["a"]', '{"label": "x"}', '{"text": 3}', '{"text": "a", "text_pair": 4}', '{"text": null}'],
)
def test_lines_that_are_no_examples(line: str, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:3 is no example like"):
        Overlap([str(path)])
    with pytest.raises(UserError, match=r"none\.jsonl: no such file of examples"):
        Overlap([str(tmp_path / "none.jsonl")])


# --- sharding without them ---

DOCUMENTS = tiny.texts(900)
EXAMPLES: Texts = [
    *((" ".join(DOCUMENTS[n].split()[2:14]), "aspect") for n in range(0, 60, 3)),  # some are below 8 words
    *(("never seen " * 5,) for _ in range(10)),
    (DOCUMENTS[700],),
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    tiny.write_jsonl(folder / "a.jsonl", DOCUMENTS[:500])
    (folder / "b.txt").write_text("\n".join([*DOCUMENTS[500:], DOCUMENTS[3], ""]))
    return folder


@pytest.fixture(scope="module")
def chosen(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSettings:
    files = tmp_path_factory.mktemp("tasks")
    names = (
        write_examples(files / "dev.jsonl", EXAMPLES[:8]),
        write_examples(files / "test.jsonl", EXAMPLES[8:]),
    )
    return ShardSettings(
        str(wordpiece), sequence_length=512, packing="document", shard_size=SHARD_SIZE, exclude=names,
        validation_share=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(raw: Path, chosen: ShardSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "corpus"
    shard_corpus([str(raw)], output, chosen)
    assert len(Corpus.open(output).manifest.shards) >= 3
    return output


def test_documents_that_overlap_are_dropped_and_counted(
    raw: Path, chosen: ShardSettings, expected: Path, wordpiece: Path, tmp_path: Path
):
    matches = [[naive(document, example) for example in EXAMPLES] for document in DOCUMENTS]
    kept = [document for document, hits in zip(DOCUMENTS, matches, strict=True) if not any(hits)]
    tiny.write_jsonl(tmp_path / "kept.jsonl", kept)
    shard_corpus([str(tmp_path / "kept.jsonl")], tmp_path / "naive", replace(chosen, exclude=()))
    ours, theirs = (
        sum((decoded(Corpus.open(folder / part), wordpiece) for part in (".", "validation")), Counter())
        for folder in (expected, tmp_path / "naive")
    )
    assert ours == theirs
    manifest = Corpus.open(expected).manifest
    dropped = 900 - len(kept)
    assert 10 < dropped < 100
    repeated = int(any(matches[3]))
    assert manifest.dropped["excluded"] == dropped + repeated
    assert manifest.dropped["duplicates"] == 1 - repeated
    found = [sum(any(column) for column in part) for part in
             (list(zip(*matches, strict=True))[:8], list(zip(*matches, strict=True))[8:])]  # fmt: skip
    assert [file.found for file in manifest.excluded] == found
    assert [file.examples for file in manifest.excluded] == [8, len(EXAMPLES) - 8]
    assert 0 < found[1] < len(EXAMPLES) - 8


def test_any_number_of_workers(raw: Path, chosen: ShardSettings, expected: Path, tmp_path: Path):
    shard_corpus([str(raw)], tmp_path / "corpus", chosen, num_workers=2)
    assert contents(tmp_path / "corpus") == contents(expected)


def test_an_interrupted_run_resumes(raw: Path, chosen: ShardSettings, expected: Path, tmp_path: Path):
    for count in (4, 7):
        in_fork_killed_at(count, [str(raw)], tmp_path / "corpus", chosen)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    shard_corpus([str(raw)], tmp_path / "corpus", chosen)
    assert contents(tmp_path / "corpus") == contents(expected)


def test_other_examples_are_another_corpus(raw: Path, chosen: ShardSettings, expected: Path, tmp_path: Path):
    moved = tuple(str(shutil.copy(path, tmp_path)) for path in reversed(chosen.exclude))
    assert shard_corpus([str(raw)], expected, replace(chosen, exclude=moved)).text_bytes == 0
    for files in ((), moved[:1]):
        with pytest.raises(UserError, match=r"holds another corpus: exclude_hash '"):
            shard_corpus([str(raw)], expected, replace(chosen, exclude=files))
    in_fork_killed_at(5, [str(raw)], tmp_path / "begun", replace(chosen, exclude=()))
    begun = shard_corpus([str(raw)], tmp_path / "begun", chosen)
    assert begun.train.content_hash == Corpus.open(expected).content_hash


def test_the_command_says_how_many(
    raw: Path, chosen: ShardSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(raw), "--tokenizer", chosen.tokenizer, "--output", str(tmp_path / "corpus")]
    assert main([*arguments, "--num_workers", "1", "--exclude", *chosen.exclude]) == 0
    printed = capsys.readouterr().out
    manifest = Corpus.open(tmp_path / "corpus").manifest
    assert f"{manifest.dropped['excluded']} excluded" in printed
    file = manifest.excluded[1]
    share = file.found / file.examples
    assert f"test.jsonl: {file.found} of {file.examples} examples ({share:.1%}) stood in the text" in printed
    with pytest.raises(UserError, match=r"no document with text in the inputs: .* 900 excluded|no such file"):
        main([*arguments, "--exclude", str(tmp_path / "none.jsonl")])
