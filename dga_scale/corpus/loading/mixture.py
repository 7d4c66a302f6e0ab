"""Several corpora in one run, each with an exact share of the tokens, whatever the number of ranks.

Rows are merged by their due times: a row of source k is due at

    (tokens of source k before it + half of its own) / share_k

tokens of the whole mixture, and rows come in the order of these times. So at every prefix each source is
within about a row of share_k of all tokens (weighted fair queuing; Demers, Keshav and Shenker, SIGCOMM 1989),
and the merge of any stretch is one sort.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dga_scale.config.arguments import number
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError

_BLOCK = 1 << 16
"""The number of rows that are merged at once on the way to a later position."""


@dataclass(frozen=True)
class Picks:
    """Consecutive rows of a mixture, (n,) int64 each."""

    sources: np.ndarray  # number of the corpus
    rows: np.ndarray  # row in that corpus
    epochs: np.ndarray  # epoch of that corpus, from 0

    def part(self, own: slice | np.ndarray) -> "Picks":
        """Return some of the rows, in the order asked for."""
        return Picks(self.sources[own], self.rows[own], self.epochs[own])


@dataclass(frozen=True)
class _State:
    """The state of a mixture: the rows and tokens taken of each source."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def position(self) -> int:
        return sum(self.rows)


class Mixture:
    """The endless sequence of rows of a run: its own corpus (source 0) and what is mixed into it.

    Each source comes in its own ``SampleOrder``, epoch after epoch. Source 0 has the run's seed: alone, it
    gives the rows, their order and their masks that it would give without a mixture.

    Any stretch follows from its position alone, so a resumed run needs one number. Forward from the last
    stretch asked for that is free; to come to a position from elsewhere, all rows before it are merged
    again, at about a microsecond each (100,000 steps of 256 rows: half a minute, once). One corpus alone
    jumps anywhere.

    Args:
        corpora: Source 0, then the corpora that are mixed in.
        shares: The share of the tokens of each corpus but the first, which gets the rest.
        seed: The run's seed.

    Example::

        mixture = Mixture([domain, general], [0.05], seed=42)
        picks = mixture.picks(step * 256, (step + 1) * 256)

    Raises:
        UserError: Shares lie outside (0, 1) or come to 1 or more together, corpora do not go together, or one
            is given twice or empty.

    """

    def __init__(self, corpora: Sequence[Corpus], shares: Sequence[float], seed: int) -> None:
        assert len(corpora) == len(shares) + 1, (len(corpora), len(shares))
        self.corpora = tuple(corpora)
        _check_shares(self.corpora, shares)
        for index, corpus in enumerate(self.corpora):
            _check_goes_with(self.corpora[:index], corpus)
        self.shares = (1.0 - sum(shares), *shares)
        self.orders = tuple(
            SampleOrder(len(corpus), source_seed(seed, source)) for source, corpus in enumerate(self.corpora)
        )
        rates = [
            share * len(corpus) / corpus.manifest.tokens
            for share, corpus in zip(self.shares, self.corpora, strict=True)
        ]
        self.row_shares = tuple(rate / sum(rates) for rate in rates)
        """The share of the rows of each source, about: a source of short rows has more of them."""
        self._last = self._start()

    def picks(self, start: int, stop: int) -> Picks:
        """Return the rows at positions ``start`` to ``stop`` of the mixture."""
        state = self._state_at(start)
        parts = [Picks(*(np.empty(0, np.int64) for _ in range(3)))]
        while state.position < stop:
            part, state = self._advance(state, stop - state.position)
            parts.append(part)
        self._last = state
        return Picks(
            np.concatenate([part.sources for part in parts]),
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.epochs for part in parts]),
        )

    def by_source(self, picks: Picks) -> Iterator[tuple[int, np.ndarray]]:
        """Split rows by their source: its number, and where in ``picks`` its rows stand."""
        for source in range(len(self.corpora)):
            where = np.flatnonzero(picks.sources == source)
            if len(where):
                yield source, where

    def lengths(self, picks: Picks) -> np.ndarray:
        """Return the number of tokens of each row: (n,) int64."""
        found = np.empty(len(picks.rows), dtype=np.int64)
        for source, where in self.by_source(picks):
            found[where] = self.corpora[source].lengths[picks.rows[where]]
        return found

    def check_one_batch(self, global_batch_size: int) -> None:
        """Refuse a corpus of which one global batch would hold a row twice.

        Raises:
            UserError: A source has fewer rows than a global batch takes of it on average.

        """
        for source, corpus in enumerate(self.corpora):
            needed = math.ceil(global_batch_size * self.row_shares[source])
            if len(corpus) < needed:
                batch = f"one global batch of {global_batch_size}"
                if len(self.corpora) > 1:
                    batch = f"the {needed} that its share of {self.shares[source]:g} takes of {batch}"
                raise UserError(
                    f"it has {len(corpus)} rows, fewer than {batch}. "
                    f"Give more text, or a smaller global batch size{' or share' if source > 0 else ''}",
                    corpus.path,
                )

    @property
    def content_hash(self) -> str:
        """The hash that identifies all rows: of one corpus its own hash."""
        hashes = [corpus.content_hash for corpus in self.corpora]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def _start(self) -> _State:
        zeros = (0,) * len(self.corpora)
        return _State(zeros, zeros)

    def _state_at(self, position: int) -> _State:
        if len(self.corpora) == 1:
            return _State((position,), (0,))  # nothing is weighed against its tokens
        state = self._last if self._last.position <= position else self._start()
        while state.position < position:
            _, state = self._advance(state, min(_BLOCK, position - state.position))
        return state

    def _advance(self, state: _State, limit: int) -> tuple[Picks, _State]:
        """Merge the next rows: at least one, at most ``limit``."""
        upcoming, lengths, due, horizon = [], [], [], math.inf
        for source, (order, corpus) in enumerate(zip(self.orders, self.corpora, strict=True)):
            # Somewhat more than its part of them, but never more than all.
            count = min(limit, math.ceil(limit * self.row_shares[source]) + 16)
            span = state.rows[source], state.rows[source] + count
            rows = order.indices(*span)
            tokens = corpus.lengths[rows].astype(np.int64)
            before = state.tokens[source] + np.cumsum(tokens) - tokens
            due.append((before + tokens / 2) / self.shares[source])
            horizon = min(horizon, due[-1][-1])
            upcoming.append(Picks(np.full(count, source), rows, order.epochs(*span)))
            lengths.append(tokens)
        times = np.concatenate(due)
        # Beyond the horizon a row may be missing; of rows due at one time the lower source comes first.
        complete = min(limit, int((times <= horizon).sum()))
        merged = np.argsort(times, kind="stable")[:complete]
        picks = Picks(
            np.concatenate([part.sources for part in upcoming]),
            np.concatenate([part.rows for part in upcoming]),
            np.concatenate([part.epochs for part in upcoming]),
        ).part(merged)
        taken = np.bincount(picks.sources, minlength=len(self.corpora)).tolist()
        tokens_taken = [int(own[:count].sum()) for own, count in zip(lengths, taken, strict=True)]
        return picks, _State(
            tuple(a + b for a, b in zip(state.rows, taken, strict=True)),
            tuple(a + b for a, b in zip(state.tokens, tokens_taken, strict=True)),
        )


def source_seed(seed: int, source: int) -> int:
    """Return the 64-bit seed of a source's order and masks; source 0 has the run's seed."""
    if source == 0:
        return seed
    return int(np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)[0])


def parse_mix(spec: str) -> tuple[Path, float]:
    """Parse ``PATH:SHARE``.

    Raises:
        UserError: The text is not of that form, or the share does not lie between 0 and 1.

    """
    path, colon, share = spec.rpartition(":")
    try:
        part = number(share)
    except argparse.ArgumentTypeError:
        part = math.nan
    if not colon or not path or math.isnan(part):
        raise UserError(
            f"--mix {spec}: not of the form PATH:SHARE. Write the folder of a corpus and its share of the "
            "tokens, for example corpora/general:0.05"
        )
    if not 0 < part < 1:
        raise UserError(
            f"--mix {spec}: the share must lie between 0 and 1, it is {part:g}. It is the part of all "
            "tokens that comes from this corpus"
        )
    return Path(path), part


def _check_shares(corpora: Sequence[Corpus], shares: Sequence[float]) -> None:
    for corpus, share in zip(corpora[1:], shares, strict=True):
        if not 0 < share < 1:
            raise UserError(f"its share {share:g} must lie between 0 and 1", corpus.path)
    # Decimal fractions such as 0.7 + 0.2 + 0.1 need not add up to 1 in binary.
    if sum(shares) > 1 - 1e-9:
        parts = " + ".join(f"{share:g}" for share in shares)
        raise UserError(
            f"the mixed corpora take {parts} = {sum(shares):g} of the tokens, which leaves nothing for "
            f"{corpora[0].path}. Lower the shares: together they must stay below 1"
        )


def _check_goes_with(earlier: Sequence[Corpus], corpus: Corpus) -> None:
    """Refuse a corpus that can't stand in one batch with those before it."""
    if not len(corpus):
        raise UserError("it has no rows. Give it text", corpus.path)
    for other in earlier:
        if corpus.content_hash == other.content_hash:
            raise UserError(
                f"it is the same as {other.path}: it would be used twice as often as its share says. Leave "
                "one out, or add up their shares",
                corpus.path,
            )
    for other in earlier[:1]:
        ours, theirs = corpus.manifest, other.manifest
        advice = "Shard its text again with the settings of the first"
        if ours.tokenizer_hash != theirs.tokenizer_hash:
            raise UserError(
                f"it was made with the tokenizer of {ours.tokenizer!r}, {other.path} with that of "
                f"{theirs.tokenizer!r}, and they tokenise differently. {advice}",
                corpus.path,
            )
        for name in ("sequence_length", "packing"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            if found != expected:
                raise UserError(f"it has {name} {found}, {other.path} has {expected}. {advice}", corpus.path)
