"""Vocabularies with terms, against transformers' own resizing and means taken by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dga_scale.backbone.loading import load_model
from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.tokenizer import Encoder, encoder_spec, load_tokenizer
from dga_scale.errors import UserError
from dga_scale.vocabulary.cli import main
from tests.helpers import tiny_corpora
from tests.helpers.ranks import run_ranks
from tests.helpers.small import make_world
from tests.helpers.tiny_models import TINY
from tests.test_train import arguments, run_training

TERMS = ["BRCA1", "tnf-alpha", "c-raf", "naïveté"]


def byte_bpe(folder: Path) -> Path:
    """RoBERTa's kind: with a mask token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpora.byte_bpe(folder))
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return folder


KINDS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    # tokenizer, architecture, what stands before a word where its pieces are looked up, further settings
    "WordPiece": (tiny_corpora.wordpiece, "bert", "", {}),
    "byte-level BPE": (byte_bpe, "roberta", " ", {}),
    "Unigram": (tiny_corpora.fast_sentencepiece, "xlm-roberta", "", {}),
    "untied": (byte_bpe, "llama", " ", {}),
    "padded": (byte_bpe, "qwen2", " ", {"vocab_size": 504}),
    "padded, with place": (tiny_corpora.wordpiece, "bert", "", {"vocab_size": 512}),
}


def made(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, str]:
    make, architecture, before, settings = KINDS[kind]
    make(folder)
    size = len(load_tokenizer(folder))
    sizes = {"vocab_size": settings.get("vocab_size", size)}
    TINY[architecture].model(**sizes).to(dtype).save_pretrained(folder)
    return folder, before


def extend(model: Path, terms: list[str], output: Path) -> Path:
    file = output.with_suffix(".txt")
    file.write_text("".join(f"{term}\n" for term in terms))
    assert main(["--model", str(model), "--terms", str(file), "--output", str(output)]) == 0
    return output


def state(folder: Path) -> dict[str, Tensor]:
    causal = "CausalLM" in json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.state_dict()


def by_hand(folder: Path, pieces: list[list[int]], rows: int) -> dict[str, Tensor]:
    """The state that transformers' resizing gives, with the mean of each term's pieces in its row."""
    causal = "CausalLM" in json.loads((folder / "config.json").read_text())["architectures"][0]
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(folder)
    tokens = len(load_tokenizer(folder))
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, head.weight, head.bias):
            for number, ids in enumerate(pieces) if weight is not None else ():
                weight[tokens + number] = weight[ids].mean(0)
    return model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_means_of_the_pieces_and_all_else_stays(kind: str, tmp_path: Path) -> None:
    folder, before = made(kind, tmp_path / "model")
    old = load_tokenizer(folder)
    pieces = [old(before + term, add_special_tokens=False)["input_ids"] for term in TERMS]
    new = state(extend(folder, TERMS, tmp_path / "new"))
    rows = {"padded": 512, "padded, with place": 512}.get(kind, len(old) + len(TERMS))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == rows
    expected = by_hand(folder, pieces, rows)
    assert new.keys() == expected.keys()
    last = len(old) + len(TERMS)
    for name, values in expected.items():
        if values.shape[:1] != (rows,):
            assert torch.equal(new[name], values), name
            continue
        assert torch.equal(new[name][: len(old)], values[: len(old)]), name
        torch.testing.assert_close(new[name][len(old) : last], values[len(old) : last], rtol=1e-6, atol=1e-7)
        assert new[name][last:].isfinite().all()
    load_model(str(tmp_path / "new"))  # the checks of training


def tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, text: str) -> list[str]:
    (ids,) = Encoder(encoder_spec(tokenizer, str(folder)))([text])
    return tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "Unigram"])
def test_texts_are_tokenised_as_before_but_for_the_terms(kind: str, tmp_path: Path) -> None:
    folder, before = made(kind, tmp_path / "model")
    new = extend(folder, TERMS, tmp_path / "new")
    was, now = load_tokenizer(folder), load_tokenizer(new)
    # A Unigram model's pieces are found at the beginning of longer words too.
    inside = ["xBRCA1 the (c-rafs"] if kind == "Unigram" else ["xBRCA1 tnf-alphas c-rafs", "naïvetés"]
    for text in [*tiny_corpora.texts(200, seed=9), *inside]:
        assert tokens(now, new, text) == tokens(was, folder, text)
    for term in TERMS:
        left, right = tokens(was, folder, "the model"), tokens(was, folder, f"{before}of data, end.")
        (one,) = tokens(now, new, term)
        assert tokens(now, new, f"the model {term} of data, end.") == [*left, one, *right]
        assert tokens(now, new, f"{term}, the") == [one, *tokens(was, folder, f"{term}, the")[-2:]]


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("WordPiece", tmp_path_factory.mktemp("wordpiece") / "model")[0]


def test_several_words_and_a_script_without_spaces(tmp_path: Path) -> None:
    folder, _ = made("byte-level BPE", tmp_path / "model")
    new = extend(folder, ["gene set", "gene", "心肌"], tmp_path / "new")
    now = load_tokenizer(new)
    assert tokens(now, new, "of the gene set") == ["of", "Ġthe", "gene set"]
    assert tokens(now, new, "of the genes") == tokens(load_tokenizer(folder), folder, "of the genes")
    assert "心肌" in tokens(now, new, "是心肌的")


def test_a_longer_word_that_begins_with_a_likely_term_is_split_as_before(tmp_path: Path) -> None:
    scores = {"<unk>": 0, "▁ne": -2, "ural": -2, "▁neu": -2.5, "ralgia": -2.5, "gia": -3, "z": -12}
    backend = Tokenizer(models.Unigram(list(scores.items()), 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>"}
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    was = load_tokenizer(folder)
    TINY["bert"].model(vocab_size=len(was)).save_pretrained(folder)
    assert was.tokenize("neural neuralgia") == ["▁ne", "ural", "▁neu", "ralgia"]
    now = load_tokenizer(extend(folder, ["neural"], tmp_path / "new"))
    assert now.tokenize("neural neuralgia") == ["▁neural", "▁neu", "ralgia"]
    assert (now.mask_token_id, now.pad_token_id) == (was.mask_token_id, was.pad_token_id)
    assert now.convert_tokens_to_ids("▁neural") == len(was)


@pytest.mark.parametrize(
    ("kind", "term"), [("WordPiece", "protein"), ("byte-level BPE", "the"), ("Unigram", "the")]
)
def test_what_is_one_token_already_is_left_out(
    kind: str, term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = made(kind, tmp_path / "model")
    extend(folder, ["BRCA1", term, "ICU"], tmp_path / "new")
    said = capsys.readouterr().out
    assert f"left out, one token already: {term} (line 2)" in said
    was = load_tokenizer(folder)
    mean = sum(len(was.tokenize(before + each)) for each in ("BRCA1", "ICU")) / 2
    assert f"added: 2 terms, which were {mean:.1f} tokens each on average; {len(was) + 2} tokens now" in said


REFUSED = {
    "": r"it is empty",
    "one\n\ntwo\n": r"line 2 is empty\. Remove it",
    "one\ntwo\none\n": r"line 3: 'one' stands in line 1 too",
    "one\n[MASK]\n": r"line 2: '\[MASK\]' is a special token",
    " one\n": r"line 1: ' one' has spaces",
    "one\ttwo\n": r"line 1: 'one\\ttwo' has spaces around it, or control characters",
    "a" * 201: r"line 1 has 201 characters, a term at most 200",
    "caf\udce9\n": r"line 1: byte 0xe9 is not UTF-8",
    "BRCA1\nbrca1\n": r"line (1|2): '(BRCA1|brca1)' is the same to this tokenizer as '(brca1|BRCA1)' of",
    "protein\n": r"each term is one token already",
}


@pytest.mark.parametrize("content", REFUSED)
def test_lines_that_are_no_terms(content: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=REFUSED[content]) as caught:
        main(["--model", str(model), "--terms", str(file), "--output", str(tmp_path / "new")])
    assert str(file) in str(caught.value) or "already" in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_other_refusals(model: Path, tmp_path: Path) -> None:
    def refused(folder: Path, terms: list[str]) -> str:
        with pytest.raises(UserError) as caught:
            extend(folder, terms, tmp_path / "new")
        return str(caught.value)

    assert "no such file" in refused_file(model, tmp_path).lower()
    unigram, _ = made("Unigram", tmp_path / "unigram")
    assert "line 2: 'gene set' is several words" in refused(unigram, ["BRCA1", "gene set"])
    slow = tiny_corpora.slow_sentencepiece(tmp_path / "slow")
    TINY["bert"].model(vocab_size=len(load_tokenizer(slow))).save_pretrained(slow)
    assert "a slow one" in refused(slow, ["BRCA1"])
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["aneurysm"])
    tokenizer.save_pretrained(model)
    assert "tools/extend_vocabulary.py adds terms to both" in refused(model, ["BRCA1"])


def refused_file(model: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        main(["--model", str(model), "--terms", str(tmp_path / "x.txt"), "--output", str(tmp_path / "new")])
    return str(caught.value)


def test_training_moves_the_new_rows(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    model = extend(world.model, ["attention heads", "deep neural"], tmp_path / "new")
    corpus = tmp_path / "terms"
    flags = ["--sequence_length", "32", "--validation_share", "0.1", "--num_workers", "1"]
    assert shard([str(world.domain_text), "--tokenizer", str(model), "--output", str(corpus), *flags]) == 0
    row = load_from_disk(str(corpus))["input_ids"]
    size = len(load_tokenizer(world.model))
    assert {size, size + 1} <= {index for ids in row for index in ids}
    new = replace(world, model=model, corpus=corpus)
    flags = arguments(new, tmp_path / "run", method="mlm", max_steps=2, general_eval_corpus=None)
    assert run_ranks(2, run_training, flags) == [0, 0]
    name = "bert.embeddings.word_embeddings.weight"
    moved = (state(tmp_path / "run" / "model")[name] - state(model)[name])[size:].abs().amax(1)
    assert moved.min() > 1e-4
