"""Packing against a plain-Python reference."""

import numpy as np
import pytest
from datasets import Features, List, Value

from dga_scale.corpus.sharding.packing import Layout, Packer, features, schema
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError

CLS, SEP, EOS = 2, 3, 9


def layout(packing: str, length: int, causal: bool = False) -> Layout:
    return Layout(
        packing=packing,
        sequence_length=length,
        prefix=() if causal else (CLS,),
        suffix=() if causal else (SEP,),
        separator=EOS if causal else SEP,
        causal=causal,
        special_ids=(CLS, SEP, EOS),
        unknown=-1,
        vocab_size=1000,
    )


def documents(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(10, 1000, generator.integers(0, 60)).astype(np.int32) for _ in range(40)]


def pack(chosen: Layout, ids: list[np.ndarray], batch: int) -> list[list[int]]:
    packer = Packer(chosen)
    rows = [row for start in range(0, len(ids), batch) for row in packer.add(ids[start : start + batch])]
    return [row.tolist() for row in [*rows, *packer.finish()]]


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("length", [10, 32, 5000])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks(batch: int, length: int, causal: bool) -> None:
    chosen, ids = layout("chunk", length, causal), documents(length)
    stream: list[int] = []
    for document in ids:
        if len(document):
            stream += ([EOS if causal else SEP] if stream else []) + document.tolist()
    content = length if causal else length - 2
    expected = [stream[start : start + content] for start in range(0, len(stream), content)]
    assert pack(chosen, ids, batch) == expected


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_documents(batch: int, causal: bool) -> None:
    chosen, ids = layout("document", 16, causal), documents(1)
    content = 16 if causal else 14
    expected = []
    for document in ids:
        left = document.tolist() + ([EOS] if causal and len(document) else [])
        while left:
            expected.append(left[:content])
            left = left[content:]
    assert pack(chosen, ids, batch) == expected


def test_an_exact_fit_leaves_no_rest() -> None:
    ids = [np.arange(10, 24, dtype=np.int32)]
    for packing in ("chunk", "document"):
        assert pack(layout(packing, 16), ids, 1) == [ids[0].tolist()]
    assert pack(layout("chunk", 16), [], 1) == []


def test_layout_of_tokenizers(wordpiece: str, byte_bpe: str, slow_sentencepiece: str) -> None:
    masked = load_tokenizer(wordpiece)
    found = Layout.of(masked, "x", "chunk", 32)
    assert (found.prefix, found.suffix, found.causal) == ((2,), (3,), False)
    assert found.content_length == 30
    causal = Layout.of(load_tokenizer(byte_bpe), "x", "chunk", 32)
    assert (causal.prefix, causal.suffix, causal.separator, causal.causal) == ((), (), 0, True)
    masked.sep_token = masked.cls_token = None
    with pytest.raises(UserError, match="the tokenizer of 'x' has no CLS and SEP"):
        Layout.of(masked, "x", "chunk", 32)


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_columns_are_described_as_datasets_does(vocab_size: int) -> None:
    ids = "uint16" if vocab_size == 1 << 16 else "int32"
    theirs = Features({"input_ids": List(Value(ids)), "length": Value("int32"), "maskable": Value("int32")})
    assert features(vocab_size) == theirs.to_dict()
    assert schema(vocab_size).equals(theirs.arrow_schema, check_metadata=True)
