"""Tokenizers, shared by the room's tests."""

from pathlib import Path

import pytest

from tests.helpers import tiny_corpora as tiny


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT-like tokenizer."""
    return tiny.wordpiece(tmp_path_factory.mktemp("tokenizers") / "wordpiece")


@pytest.fixture(scope="session")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT-2-like tokenizer."""
    return tiny.byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe")


@pytest.fixture(scope="session")
def slow_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer that runs in Python."""
    return tiny.slow_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "slow")


@pytest.fixture(scope="session")
def fast_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sentencepiece tokenizer with a mask token."""
    return tiny.fast_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "fast")
