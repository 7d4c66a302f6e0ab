"""Find end-task examples that occur in unlabelled text, by 8-grams of words that both contain.

A word is a run of letters and digits, whatever its case (in Chinese and Japanese: one character), so that
markers around entities, brackets and tokenised punctuation do not matter. An example of fewer words matches
a document that consists of the same words.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dga_scale.corpus.reading.cleaning import clean
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment, segments
from dga_scale.corpus.shards import file_sha256
from dga_scale.errors import UserError

GRAM = 8
"""The number of consecutive words that make two texts overlap."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
_BRACKET = re.compile("-[LR][RSC]B-")  # how treebanks write ( ) [ ] { }

_FACTOR = 0x9E3779B97F4A7C15
_POWERS = [pow(_FACTOR, position, 2**64) for position in range(GRAM)]

_TEXT_BYTES = 1 << 26
"""The bytes of text read at a time where a whole corpus is compared."""


@dataclass(frozen=True)
class ExampleFile:
    """A file of examples, and the number of examples in it."""

    path: str
    sha256: str
    examples: int


class Overlap:
    """Index of examples by their 8-grams of words, each stored as a hash of 64 bits.

    Args:
        paths: Files of JSON lines with ``text`` and perhaps ``text_pair``; other fields are not read.

    Raises:
        UserError: A file does not exist, or a line (named) is not an example.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.files: list[ExampleFile] = []
        self._vocabulary: dict[str, int] = {}
        self._short: dict[str, list[int]] = {}
        grams: list[np.ndarray] = [np.empty(0, np.uint64)]
        example_of_gram: list[np.ndarray] = [np.empty(0, np.int64)]
        number = 0
        for path in paths:
            first = number
            for texts in read_examples(Path(path)):
                words_of_texts = [words(text) for text in texts]
                for found in words_of_texts:
                    if len(found) >= GRAM:
                        self._add_words(found)
                        grams.append(_grams(self._hashes(found)))
                        example_of_gram.append(np.full(len(grams[-1]), number))
                longest = max(words_of_texts, key=len)
                if 0 < len(longest) < GRAM:
                    self._short.setdefault(" ".join(longest), []).append(number)
                number += 1
            self.files.append(ExampleFile(path, file_sha256(Path(path)), number - first))
        every, examples = np.concatenate(grams), np.concatenate(example_of_gram)
        order = np.argsort(every, kind="stable")
        self._grams, self._examples = every[order], examples[order]

    @property
    def content_hash(self) -> str:
        """The identity of the examples: a hash that does not depend on the order of their files."""
        return hashlib.sha256(" ".join(sorted(file.sha256 for file in self.files)).encode()).hexdigest()

    def find(self, text: str) -> np.ndarray:
        """Return the sorted numbers of the examples, over all files, that share an 8-gram with a document."""
        found = words(text)
        if len(found) < GRAM:
            return np.array(self._short.get(" ".join(found), []), dtype=np.int64)
        grams = _grams(self._hashes(found))
        first = np.searchsorted(self._grams, grams)
        last = np.searchsorted(self._grams, grams, side="right")
        examples = [self._examples[a:b] for a, b in zip(first, last, strict=True) if a < b]
        return np.unique(np.concatenate([np.empty(0, np.int64), *examples]))

    def counts(self, found: Iterable[int]) -> list[int]:
        """Count how many of each file's examples are among the numbers ``found``."""
        ends = np.cumsum([file.examples for file in self.files])
        numbers = np.array(sorted(set(found)), dtype=np.int64)
        return np.diff(np.searchsorted(numbers, np.concatenate([[0], ends]))).tolist()

    def _add_words(self, found: list[str]) -> None:
        for word in found:
            if word not in self._vocabulary:
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                self._vocabulary[word] = int.from_bytes(digest, "little") | 1

    def _hashes(self, found: list[str]) -> np.ndarray:
        """Return the hash of each word (n,); 0 for words that no example has."""
        return np.fromiter((self._vocabulary.get(word, 0) for word in found), np.uint64, len(found))


def words(text: str) -> list[str]:
    """Split a text into normalised words for the comparison."""
    return _WORD.findall(unicodedata.normalize("NFKC", _BRACKET.sub(" ", text)).casefold())


def read_examples(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the texts of each example: one, or two of a pair.

    Raises:
        UserError: The file does not exist, or a line is not an example.
    """
    if not path.is_file():
        raise UserError("no such file of examples. Give JSON lines with a text in each", path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            fields: Any = content if isinstance(content, dict) else {}
            texts = tuple(fields[name] for name in ("text", "text_pair") if fields.get(name) is not None)
            if "text" not in fields or not all(isinstance(text, str) for text in texts) or not texts:
                raise UserError(f'{path}:{number} is no example like {{"text": "..."}}: {line[:60]!r}')
            yield texts


@lru_cache(maxsize=1)
def load_overlap(paths: tuple[str, ...]) -> Overlap:
    """Index the examples of some files, once in a process."""
    return Overlap(paths)


def found_in_text(overlap: Overlap, inputs: Sequence[str], options: ReadOptions) -> list[int]:
    """Count how many of each file's examples occur in raw text, which is read as the sharder reads it.

    Raises:
        UserError: The sharder would refuse the text too.
    """
    found: set[int] = set()
    for number, source in enumerate(find_sources(inputs)):
        for segment in segments(number, source, options, _TEXT_BYTES):
            for text in read_segment(source, segment, options, Records()):
                found.update(overlap.find(clean(text)).tolist())
    return overlap.counts(found)


def _grams(hashes: np.ndarray) -> np.ndarray:
    """Return the hashes (m,) of all GRAM consecutive words, without those that contain a word of hash 0."""
    count = len(hashes) - GRAM + 1
    known = np.lib.stride_tricks.sliding_window_view(hashes != 0, GRAM).all(axis=-1)  # (n - GRAM + 1,)
    total = np.zeros(count, dtype=np.uint64)
    for position, power in enumerate(_POWERS):
        total += hashes[position : position + count] * np.uint64(power)
    return total[known]
