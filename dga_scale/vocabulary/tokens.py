"""Terms as tokens of a tokenizer, each in the way in which its kind writes words."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerBase

from dga_scale.corpus.tokenizer import load_tokenizer, unknown_id
from dga_scale.errors import UserError
from dga_scale.vocabulary.terms import Term

_SPACE_IN_WORDS = ("ByteLevel", "Metaspace", "\u2581")
"""What a tokenizer's description has where the space before a word belongs to the word's first token."""
_MARGIN = 1e-3
"""What makes a piece likelier than the pieces that it is made of, in nats."""
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Beginnings of the names of letters that are written without spaces between words."""


@dataclass(frozen=True)
class AddedTerm:
    """A term that has become a token."""

    term: Term
    id: int
    pieces: tuple[int, ...]
    """The ids that it was tokenised into before."""


def add_terms(
    name_or_path: str, terms: Sequence[Term]
) -> tuple[PreTrainedTokenizerBase, tuple[AddedTerm, ...], tuple[Term, ...]]:
    """Add terms to a tokenizer; those that are one token already are left out.

    A Unigram model gets a piece for each. Any other kind looks for the whole words before it tokenises what
    is between them; where words carry the space before them, the term's token takes it too.

    Returns:
        The tokenizer, the terms added, and those left out.

    Raises:
        UserError: The tokenizer is a slow one, or what stands around a term would be tokenised in another
            way; a term is a special token, the same as another one to the tokenizer, or all are left out.
    """
    before = load_tokenizer(name_or_path)
    if not before.is_fast:
        raise UserError(
            f"its tokenizer is a slow one ({type(before).__name__}), to which no terms can be added. Convert "
            "it to a tokenizer.json",
            name_or_path,
        )
    if special := next((each for each in terms if each.text in before.all_special_tokens), None):
        raise special.refused(f"is a special token of {name_or_path}. Remove it")
    tried = _added(load_tokenizer(name_or_path), before, terms)
    unknown = unknown_id(before)
    new = [
        each for each in tried if each.id >= len(before) and (len(each.pieces) > 1 or unknown in each.pieces)
    ]
    if not new:
        raise UserError(f"each term is one token already: {name_or_path} needs no others")
    kept = {each.term for each in new}
    after = load_tokenizer(name_or_path)
    return after, _added(after, before, [each.term for each in new]), tuple(t for t in terms if t not in kept)


def _added(
    after: PreTrainedTokenizerBase, before: PreTrainedTokenizerBase, terms: Sequence[Term]
) -> tuple[AddedTerm, ...]:
    """Add terms to ``after``, and compare it with the same tokenizer without them."""
    backend = after.backend_tokenizer
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] == "Unigram":
        names = _add_pieces(backend, spec, terms)
    else:
        spaces = any(sign in json.dumps([spec["pre_tokenizer"], spec["normalizer"]], ensure_ascii=False)
                     for sign in _SPACE_IN_WORDS)  # fmt: skip
        names = [term.text for term in terms]
        after.add_tokens(
            [
                AddedToken(name, single_word=_in_spaces(name), lstrip=spaces, normalized=not spaces)
                for name in names
            ]
        )
    ids = [backend.token_to_id(name) for name in names]
    owner: dict[int, Term] = {}
    for term, index in zip(terms, ids, strict=True):
        if index in owner:
            raise _same(term, owner[index])
        owner[index] = term
    return tuple(
        AddedTerm(term, index, _pieces(before.backend_tokenizer, backend, term, index, owner))
        for term, index in zip(terms, ids, strict=True)
    )


def _add_pieces(backend: Tokenizer, spec: dict[str, Any], terms: Sequence[Term]) -> list[str]:
    """Append a piece for each term to a Unigram model, as likely as the pieces that the term had together.

    So it is taken where these were, and any other text is segmented as before.

    Returns:
        The pieces.
    """
    model = spec["model"]
    vocabulary = [(piece, score) for piece, score in model["vocab"]]
    for token in sorted(spec["added_tokens"], key=lambda token: token["id"]):
        if token["id"] >= len(vocabulary):  # a token beside the model, whose id the first term would get
            vocabulary.append((token["content"], 0.0))
    least = min(score for _, score in vocabulary)
    pieces = []
    for term in terms:
        normal = backend.normalizer.normalize_str(term.text) if backend.normalizer else term.text
        words = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, ())]
        if len(words) > 1:
            raise term.refused("is several words, which this tokenizer never joins. Remove it")
        ids = backend.encode(term.text, add_special_tokens=False).ids
        # Not below the least likely piece, by which an unknown character's score is set.
        scores = [least if index == model["unk_id"] else vocabulary[index][1] for index in ids]
        likely = max(least, sum(scores))
        pieces.append(words[0][0])
        vocabulary.append((pieces[-1], likely + _MARGIN))
    backend.model = models.Unigram(vocabulary, model["unk_id"], model["byte_fallback"])
    return pieces


def _in_spaces(text: str) -> bool:
    """Return whether the word's script parts words by spaces, so that it is looked for between them."""
    return not any(unicodedata.name(letter, "").startswith(_WITHOUT_SPACES) for letter in text)


def _pieces(
    before: Tokenizer, after: Tokenizer, term: Term, index: int, owner: dict[int, Term]
) -> tuple[int, ...]:
    """Return the ids that a term has had between two words, of which it is the only change."""
    text = f"0 {term.text} 0"
    old, new = (each.encode(text, add_special_tokens=False).ids for each in (before, after))
    if index in new:
        first = new.index(index)
        left, right = new[:first], new[first + 1 :]
        changed = slice(first, len(old) - len(right))
        if old[changed] and [*left, *old[changed], *right] == old:
            return tuple(old[changed])
    elif others := [owner[each] for each in new if each in owner]:
        raise _same(term, others[0])
    raise term.refused(
        "can't be added: this tokenizer would split what stands around it otherwise. Remove it"
    )


def _same(term: Term, other: Term) -> UserError:
    return term.refused(f"is the same to this tokenizer as {other.text!r} of line {other.line}. Remove one")
