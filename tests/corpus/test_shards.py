"""Opening and verifying a corpus, and matching it with a model."""

import json
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus, check_matches, check_sequence_length
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny
from tests.helpers.damage import DAMAGES, every_damage, flip

UNREAD = ("dataset_info.json", "state.json", "validation/dataset_info.json", "validation/state.json")
"""For ``datasets.load_from_disk``; a run does without."""


@pytest.fixture(scope="module")
def made(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several shards."""
    folder = tmp_path_factory.mktemp("made")
    path = tiny.write_jsonl(folder / "a.jsonl", tiny.texts(800))
    settings = ShardSettings(str(wordpiece), sequence_length=32, shard_size=0.02, validation_share=0.05)
    shard_corpus([str(path)], folder / "corpus", settings)
    return folder / "corpus"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The corpus, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def test_rows_are_those_of_the_arrow_files(made: Path) -> None:
    corpus = Corpus.open(made, verify="sha256")
    assert len(corpus.manifest.shards) >= 3
    reference = [
        row
        for shard in corpus.manifest.shards
        for row in Dataset.from_file(str(made / shard.file))["input_ids"]
    ]
    assert len(corpus) == len(reference)
    order = np.random.default_rng(0).permutation(len(corpus))
    for index, row in zip(order, corpus.rows(order), strict=True):
        assert row.dtype == np.int32
        assert row.tolist() == reference[index]
    assert Corpus.open(made / "validation").manifest.split == "validation"


def test_many_shards_need_no_open_files(made: Path) -> None:
    corpus = Corpus.open(made)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 3, limit[1]))
    try:
        assert len(corpus.lengths) == len(corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(corpus.manifest.shards) > 3


def test_hash_is_of_the_content(made: Path, copy: Path) -> None:
    assert Corpus.open(copy).content_hash == Corpus.open(made).content_hash
    assert Corpus.open(copy).content_hash != Corpus.open(copy / "validation").content_hash


def test_truncated_shard(copy: Path) -> None:
    shard = copy / "data-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data-00001\.arrow: a shard of \d+ bytes, the manifest says \d+"):
        Corpus.open(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001\.arrow: no such shard"):
        Corpus.open(copy)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_one_flipped_byte(where: float, copy: Path) -> None:
    shard = copy / "data-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[int(len(data) * where)] ^= 1
    shard.write_bytes(data)
    Corpus.open(copy)  # sizes agree
    with pytest.raises(UserError, match=r"data-00002\.arrow: the shard was changed: its sha256 is"):
        Corpus.open(copy, verify="sha256")


def test_any_damage_to_any_file_is_named(made: Path, copy: Path) -> None:
    parts = (copy, copy / "validation")
    whole = [Corpus.open(part).manifest for part in parts]
    for file, damage in every_damage(copy):
        kept = (copy / file).read_bytes()
        DAMAGES[damage](copy / file)
        try:
            found = [Corpus.open(part, verify="sha256").manifest for part in parts]
        except UserError as error:
            message = str(error)
        else:
            assert found == whole, (file, damage)
            message = file  # the line's end of a manifest, or a file that nothing reads
            assert (Path(file).name, damage) == ("manifest.json", "last byte cut") or file in UNREAD
        # Where a manifest says something else of a shard, it shows at that shard.
        name = Path(file).name
        assert name in message or (name == "manifest.json" and ".arrow" in message), (file, damage)
        (copy / file).write_bytes(kept)


def test_a_manifest_with_any_bit_flipped_is_refused_or_says_the_same(copy: Path) -> None:
    path, draws, refused = copy / "manifest.json", random.Random(0), 0
    kept, whole = path.read_bytes(), Corpus.open(copy).manifest
    for _ in range(200):
        flip(path, draws.random(), draws.randrange(8))
        try:
            assert Corpus.open(copy).manifest == whole
        except UserError:
            refused += 1
        path.write_bytes(kept)
    assert refused > 190


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such folder\. Give one that tools/shard_corpus"):
        Corpus.open(tmp_path / "nothing")
    text = tmp_path / "raw.txt"
    text.write_text("raw")
    with pytest.raises(
        UserError, match=r"raw\.txt: a file, not a corpus.*shard_corpus\.py .*raw\.txt --token"
    ):
        Corpus.open(text)
    with pytest.raises(UserError, match=r"no corpus in it \(manifest\.json is missing\)"):
        Corpus.open(tmp_path)


def test_damaged_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    for text in ("{", "[]", json.dumps({k: v for k, v in content.items() if k != "rows"})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: damaged"):
            Corpus.open(copy)
    path.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match=r"corpus format 99, this version reads 2"):
        Corpus.open(copy)


def test_tokenizer_of_the_model_matches(made: Path, wordpiece: Path, byte_bpe: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(made)
    check_matches(corpus, load_tokenizer(wordpiece))
    check_matches(corpus, AutoTokenizer.from_pretrained(wordpiece))
    with pytest.raises(UserError, match=r"it has a vocabulary of \d+, the model's tokenizer one of \d+"):
        check_matches(corpus, load_tokenizer(byte_bpe))

    swapped = load_tokenizer(wordpiece)
    swapped.mask_token = "[UNK]"
    with pytest.raises(UserError, match=r"it has special tokens .*'mask': 4"):
        check_matches(corpus, swapped)

    shutil.copytree(wordpiece, tmp_path / "cased")
    content = json.loads((wordpiece / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (tmp_path / "cased" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"of the same size as the model's tokenizer, but is tokenised differently"
    ):
        check_matches(corpus, load_tokenizer(tmp_path / "cased"))


def test_rows_longer_than_the_model(made: Path) -> None:
    corpus = Corpus.open(made)
    check_sequence_length(corpus, 32)
    with pytest.raises(
        UserError, match=r"rows of 32 tokens, the model takes at most 31\. Shard the text again"
    ):
        check_sequence_length(corpus, 31)
    check_sequence_length(Corpus(made, replace(corpus.manifest, sequence_length=16)), 31)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"new{number}" for number in range(70_000))]
    large = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": words[0], "cls_token": words[2], "sep_token": words[3], "mask_token": words[4]}
    PreTrainedTokenizerFast(tokenizer_object=large, **special).save_pretrained(tmp_path / "large")
    (tmp_path / "a.txt").write_text("new5 new69999 new7\n")
    settings = ShardSettings(
        str(tmp_path / "large"), packing="document", sequence_length=8, validation_share=0
    )
    shard_corpus([str(tmp_path / "a.txt")], tmp_path / "corpus", settings)
    assert Corpus.open(tmp_path / "corpus").row(0).tolist() == [2, 10, 70_004, 12, 3]
