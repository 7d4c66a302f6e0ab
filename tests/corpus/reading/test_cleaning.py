"""Unicode cleaning, against what each rule says."""

import unicodedata

import pytest

from dga_scale.corpus.reading.cleaning import clean


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("plain text", "plain text"),
        ("  trimmed\t\n", "trimmed"),
        ("a\r\nb\rc\u2028d\x85e\x0cf", "a\nb\nc\nd\ne\nf"),
        ("nul\x00bell\x07escape\x1bdel\x7fc1\x9cend", "nul bell escape del c1 end"),
        ("alpha\x1fbeta", "alpha beta"),
        ("\ufeffbyte order mark", "byte order mark"),
        ("lone \ud83d surrogate", "lone  surrogate"),
        ("not a character \ufffe\uffff\ufdd0", "not a character"),
        ("cafe\u0301", "café"),
        (
            "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
            "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        ),
        ("tab\tkept", "tab\tkept"),
        ("नमस्ते 語", "नमस्ते 語"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize("raw", ["", " \n\t", "\x00\x01\x1f", "\u200b\u200d \ufeff", "\ud800", "\u3000\xa0"])
def test_nothing_visible_is_nothing(raw: str) -> None:
    assert clean(raw) == ""


def test_what_is_left_is_valid_unicode() -> None:
    everything = "".join(map(chr, range(0x110000)))
    left = clean("a" + everything)
    left.encode("utf-8")
    assert unicodedata.is_normalized("NFC", left)
    assert {c for c in left if unicodedata.category(c) == "Cc"} == {"\t", "\n"}


def test_each_character_alone() -> None:
    """Text with nothing to remove is told at a look: nothing else may pass by it."""
    for code in range(0x10000):
        character = chr(code)
        if character in "\n\r\x0b\x0c\x85\u2028\u2029":
            kept = "\n"
        elif unicodedata.category(character) == "Cc" and character != "\t":
            kept = " "
        elif character == "\ufeff" or 0xFDD0 <= code <= 0xFDEF or code >= 0xFFFE:
            kept = ""
        else:
            kept = "" if unicodedata.category(character) == "Cs" else character
        assert clean(f"a{character}b") == unicodedata.normalize("NFC", f"a{kept}b"), hex(code)
