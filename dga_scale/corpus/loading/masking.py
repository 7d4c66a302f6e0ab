"""Masking of tokens: which, and by what, is decided by (seed, epoch, row, position) alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dga_scale.corpus.loading.philox import below, philox4x32
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError

IGNORED = -100
"""The label of a position that no loss counts."""

_REPLACEMENTS = np.uint64(1 << 31)
"""The first counter word of the draws for what replaces a token; those for positions start at 0."""

_NEVER = np.uint64(1 << 32)
"""A score above every 32-bit score."""


@dataclass(frozen=True, kw_only=True)
class MaskingPolicy:
    """Masked language modelling as BERT does it: which positions are masked, and by what."""

    probability: float
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]

    @classmethod
    def for_corpus(
        cls,
        corpus: Corpus,
        probability: float,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> "MaskingPolicy":
        """Return the policy with the corpus's vocabulary and special tokens.

        Raises:
            UserError: The corpus's tokenizer has no mask token.
        """
        manifest = corpus.manifest
        if "mask" not in manifest.special_ids:
            raise UserError(
                f"it was made with {manifest.tokenizer!r}, whose tokenizer has no mask token: masked LM is "
                "not possible. Train a causal model on it, or shard the text with an encoder's tokenizer",
                corpus.path,
            )
        return cls(
            probability=probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            mask_token_id=manifest.special_ids["mask"],
            vocab_size=manifest.vocab_size,
            special_ids=manifest.all_special_ids,
        )

    @cached_property
    def is_special(self) -> np.ndarray:
        """Whether each id is a special token: (vocab_size,) bool."""
        special = np.zeros(self.vocab_size, dtype=bool)
        special[list(self.special_ids)] = True
        return special

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that a random replacement is drawn from."""
        return np.flatnonzero(~self.is_special)


def masked_count(maskable: np.ndarray | int, probability: float) -> np.ndarray:
    """Return how many of ``maskable`` tokens n of a row are masked: round(p * n), at least 1 where n >= 1."""
    counts = np.rint(probability * np.asarray(maskable)).astype(np.int64)
    return np.where(np.asarray(maskable) > 0, np.maximum(counts, 1), 0)


def label_counts(corpus: Corpus, rows: np.ndarray, masking: MaskingPolicy | None) -> np.ndarray:
    """Return the number of labels that each row will have, without reading it: (len(rows),) int64."""
    if masking is None:
        return corpus.lengths[rows].astype(np.int64) - 1
    return masked_count(corpus.maskable[rows], masking.probability)


def mask_tokens(
    ids: np.ndarray,
    real: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray | int,
    masking: MaskingPolicy,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask rows of token ids.

    Args:
        ids: (B, T) token ids; what a token draws does not depend on T.
        real: (B, T) bool, whether a row has a token there.
        rows: (B,) the rows' indices in the corpus.
        epochs: (B,) the epoch of each row, or one for all.
        masking: The share of the tokens, and what replaces them.
        seed: The seed, 64 bits.

    Returns:
        The masked ids, ``real``, and labels, (B, T) each: the true id of each masked token, IGNORED
        elsewhere.
    """
    batch_size, length = ids.shape
    maskable = real & ~masking.is_special[ids]
    counts = masked_count(maskable.sum(axis=1), masking.probability)  # (B,)
    words = np.asarray(rows, dtype=np.uint64)[:, None]
    row_words = (words & np.uint64(0xFFFFFFFF), words >> np.uint64(32))
    epoch = np.broadcast_to(np.asarray(epochs, dtype=np.uint64), (batch_size,))[:, None]

    # Positions with the smallest of the random scores are masked: exactly `counts` of them, all sets alike.
    blocks = np.arange(-(-length // 4), dtype=np.uint64)[None, :]
    scores = philox4x32(seed, blocks, epoch, *row_words).reshape(batch_size, -1)[:, :length]
    scores[~maskable] = _NEVER
    order = np.argsort(scores, axis=1, kind="stable")
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, np.arange(length) < counts[:, None], axis=1)
    at = np.nonzero(chosen)  # rows and positions of all masked tokens, in rising order

    tokens = ids[at]
    row_of, positions = at[0], at[1].astype(np.uint64)
    of_rows = (epoch, *row_words)
    draws = philox4x32(seed, positions + _REPLACEMENTS, *(words[row_of, 0] for words in of_rows))  # (N, 4)
    kind = draws[:, 0] / 2.0**32  # in [0, 1)
    random_ids = masking.ordinary_ids[below(draws[:, 1], len(masking.ordinary_ids))]
    masked_ids = ids.copy()
    masked_ids[at] = np.where(
        kind < masking.mask_replace_prob,
        masking.mask_token_id,
        np.where(kind < masking.mask_replace_prob + masking.random_replace_prob, random_ids, tokens),
    )
    labels = np.full_like(ids, IGNORED)
    labels[at] = tokens
    return masked_ids, real, labels
