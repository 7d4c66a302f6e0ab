"""Rows to batches: masking, padding to static shapes, the slice of each rank, prefetch.

What a row draws is decided by (seed, epoch, row) alone, so every number of ranks sees the same samples and
the same masks for each global batch.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dga_scale.corpus.mixture import Mixture, Picks
from dga_scale.corpus.order import SampleOrder
from dga_scale.corpus.philox import below, philox4x32
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError

IGNORED = -100
"""Label of a position that no loss counts."""

_REPLACEMENTS = np.uint64(1 << 31)
"""Added to the first counter word of the draws for what replaces a token; those for positions start at 0."""

_NEVER = np.uint64(1 << 32)
"""Above every 32-bit score."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, on the CPU, int64. B rows of T tokens, M predicted positions a row."""

    input_ids: torch.Tensor  # (B, T) as in the corpus, padded
    masked_ids: torch.Tensor  # (B, T) with masked positions replaced; causal: the same as input_ids
    attention_mask: torch.Tensor  # (B, T) 1 = a real token
    positions: torch.Tensor  # (B, M) predicted positions in rising order, then zeros
    labels: torch.Tensor  # (B, M) the true ids there, then IGNORED; causal: the id after each position
    sample_ids: torch.Tensor  # (B,) row in its corpus; -1 in a row that only fills up a batch
    sources: torch.Tensor  # (B,) number of its corpus in the mixture


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
        """The policy with the corpus's vocabulary and special tokens.

        Raises:
            UserError: the corpus's tokenizer has no mask token.
        """
        manifest = corpus.manifest
        if "mask" not in manifest.special_ids:
            raise UserError(
                f"corpus {corpus.path} was made with {manifest.tokenizer!r}, whose tokenizer has no mask "
                "token: masked LM is not possible. Train a causal model on it, or shard the text with the "
                "tokenizer of an encoder"
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
        """(vocab_size,) bool."""
        special = np.zeros(self.vocab_size, dtype=bool)
        special[list(self.special_ids)] = True
        return special

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Ids that a random replacement is drawn from."""
        return np.flatnonzero(~self.is_special)


def masked_count(maskable: np.ndarray | int, probability: float) -> np.ndarray:
    """Masked positions of rows with ``maskable`` ordinary tokens: round(p * n), at least 1 where n >= 1."""
    counts = np.rint(probability * np.asarray(maskable)).astype(np.int64)
    return np.where(np.asarray(maskable) > 0, np.maximum(counts, 1), 0)


def label_counts(corpus: Corpus, rows: np.ndarray, masking: MaskingPolicy | None) -> np.ndarray:
    """Labels that each of ``rows`` will have, without reading them: (len(rows),) int64."""
    if masking is None:
        return corpus.lengths[rows].astype(np.int64) - 1
    return masked_count(corpus.maskable[rows], masking.probability)


def build_batch(
    corpus: Corpus,
    rows: np.ndarray,
    epochs: np.ndarray | int,
    masking: MaskingPolicy | None,
    seed: int,
    source: int = 0,
) -> Batch:
    """Read and mask ``rows``. Shapes depend on the number of rows and the corpus's settings only.

    Args:
        corpus: Where the rows are read.
        rows: (B,) row indices.
        epochs: (B,) or one: the epoch of each row, from which (with seed and row) its mask is drawn.
        masking: None for a causal model, whose labels are the next tokens.
        seed: 64 bits.
        source: number of the corpus in its mixture.
    """
    length = corpus.manifest.sequence_length
    ids = np.full((len(rows), length), corpus.manifest.special_ids.get("pad", 0), dtype=np.int64)  # (B, T)
    lengths = np.empty(len(rows), dtype=np.int64)
    for number, row in enumerate(corpus.rows(rows)):
        lengths[number] = len(row)
        ids[number, : len(row)] = row
    real = np.arange(length) < lengths[:, None]  # (B, T)
    if masking is None:
        masked_ids = ids
        positions = np.broadcast_to(np.arange(length - 1), (len(rows), length - 1))  # (B, T - 1)
        has_label = real[:, 1:]
        labels = np.where(has_label, ids[:, 1:], IGNORED)
        positions = np.where(has_label, positions, 0)
    else:
        cap = int(masked_count(corpus.manifest.content_length, masking.probability))
        masked_ids, positions, labels = _mask(ids, real, rows, epochs, masking, cap, seed)
    return Batch(
        input_ids=torch.from_numpy(ids),
        masked_ids=torch.from_numpy(masked_ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        sample_ids=torch.from_numpy(np.array(rows, dtype=np.int64)),
        sources=torch.full((len(rows),), source),
    )


def mixed_batch(mixture: Mixture, picks: Picks, masking: MaskingPolicy | None) -> Batch:
    """Read and mask rows of several corpora, in the order of ``picks``; each draws as in its corpus alone."""
    places, parts = [], []
    for source, where in mixture.by_source(picks):
        corpus, seed = mixture.corpora[source], mixture.orders[source].seed
        own = picks.part(where)
        places.append(where)
        parts.append(build_batch(corpus, own.rows, own.epochs, masking, seed, source))
    if len(parts) == 1:
        return parts[0]
    back = torch.from_numpy(np.argsort(np.concatenate(places)))
    return Batch(
        **{name: torch.cat([getattr(part, name) for part in parts])[back] for name in vars(parts[0])}
    )


def _mask(
    ids: np.ndarray,
    real: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray | int,
    masking: MaskingPolicy,
    cap: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masked ids (B, T), positions (B, M) and labels (B, M), M = ``cap``."""
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
    chosen = np.argsort(scores, axis=1, kind="stable")[:, :cap]  # (B, M)
    unused = np.arange(cap) >= counts[:, None]
    chosen[unused] = length  # sorts to the end
    chosen.sort(axis=1)
    positions = np.where(unused, 0, chosen)

    row_numbers = np.arange(batch_size)[:, None]
    labels = np.where(unused, IGNORED, ids[row_numbers, positions])
    draws = philox4x32(seed, positions.astype(np.uint64) + _REPLACEMENTS, epoch, *row_words)
    kind = draws[..., 0] / 2.0**32  # (B, M) in [0, 1)
    random_ids = masking.ordinary_ids[below(draws[..., 1], len(masking.ordinary_ids))]
    replaced = np.where(
        kind < masking.mask_replace_prob,
        masking.mask_token_id,
        np.where(kind < masking.mask_replace_prob + masking.random_replace_prob, random_ids, labels),
    )
    masked_ids = ids.copy()
    row_of, slot_of = np.nonzero(~unused)
    masked_ids[row_of, positions[row_of, slot_of]] = replaced[row_of, slot_of]
    return masked_ids, positions, labels


@dataclass(frozen=True)
class StepBatches:
    """What one rank needs for one optimizer step."""

    step: int
    micro_batches: list[Batch]
    global_masked: tuple[int, ...]
    """By source, labels of the global batch: of all ranks and micro-steps."""
    global_tokens: tuple[int, ...]
    """By source, real tokens of the global batch."""


class BatchStream:
    """One rank's micro-batches, step after step, prepared ahead by a background thread.

    Step s trains on positions [s * G, (s + 1) * G) of the mixture, G the global batch size; micro-step m of
    rank r takes the rows [(m * world_size + r) * b, (m * world_size + r + 1) * b) of it, b the micro-batch
    size. At most ``prefetch`` steps are prepared ahead.

    Example::

        with BatchStream(mixture, masking, global_batch_size=256, micro_batch_size=32, rank=0, world_size=4,
                         start_step=0, num_steps=1000) as stream:
            for batches in stream:
                ...

    Raises:
        UserError: batch sizes that do not divide, or a corpus with fewer rows than one global batch takes.
    """

    def __init__(
        self,
        mixture: Mixture,
        masking: MaskingPolicy | None,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
        prefetch: int = 4,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"global batch size {global_batch_size} is not a multiple of {micro_batch_size} "
                f"(micro-batch) x {world_size} (ranks). Choose a global batch size that divides"
            )
        mixture.check_one_batch(global_batch_size)
        self._mixture, self._masking = mixture, masking
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._steps = range(start_step, start_step + num_steps)
        self._queue: queue.SimpleQueue[StepBatches | BaseException] = queue.SimpleQueue()
        self._free_slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, step: int) -> StepBatches:
        """This rank's part of global batch ``step``."""
        picks = self._mixture.picks(step * self._global, (step + 1) * self._global)
        firsts = range(self._rank * self._micro, self._global, self._world_size * self._micro)
        masked, tokens = [0] * len(self._mixture.corpora), [0] * len(self._mixture.corpora)
        for source, where in self._mixture.by_source(picks):
            corpus, rows = self._mixture.corpora[source], picks.rows[where]
            masked[source] = int(label_counts(corpus, rows, self._masking).sum())
            tokens[source] = int(corpus.lengths[rows].sum(dtype=np.int64))
        return StepBatches(
            step=step,
            micro_batches=[
                mixed_batch(self._mixture, picks.part(slice(first, first + self._micro)), self._masking)
                for first in firsts
            ],
            global_masked=tuple(masked),
            global_tokens=tuple(tokens),
        )

    def __iter__(self) -> Iterator[StepBatches]:
        assert self._thread is None, "a stream is read once"
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        self._thread.start()
        try:
            for _ in self._steps:
                item = self._queue.get()
                self._free_slots.release()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the background thread and wait for it."""
        self._stop.set()
        self._free_slots.release()
        if self._thread is not None:
            self._thread.join()

    def _produce(self) -> None:
        try:
            for step in self._steps:
                self._free_slots.acquire()
                if self._stop.is_set():
                    return
                self._queue.put(self.step(step))
        except BaseException as error:  # handed over: it is raised where the batch is asked for
            self._queue.put(error)


class EvalBatches:
    """Every row once with fixed masks, split over ranks; all ranks get the same number of batches.

    Batch n of rank r holds rows [(n * world_size + r) * b, ...) of a fixed order; where rows run out, a batch
    is filled up with repeated rows that have no labels (sample_ids -1). Iterating again gives the same.

    Args:
        corpus: What is evaluated.
        masking: None for a causal model.
        batch_size: Rows a batch.
        rank: This process.
        world_size: Processes.
        max_rows: Evaluate this many rows only, a fixed sample of the corpus; None: all.
    """

    SEED = 20_230_118

    def __init__(
        self,
        corpus: Corpus,
        masking: MaskingPolicy | None,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        max_rows: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        if not len(corpus):
            raise UserError(
                f"corpus {corpus.path} has no rows to evaluate. Hold out more: --validation_share"
            )
        self._corpus, self._masking = corpus, masking
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        count = len(corpus) if max_rows is None else min(max_rows, len(corpus))
        # The order spreads a sample over the corpus: neighbouring chunks come from one document.
        self._rows = np.sort(SampleOrder(len(corpus), self.SEED).indices(0, count))

    def __len__(self) -> int:
        """Batches of this rank, as of every rank."""
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._world_size + self._rank) * self._batch_size
            rows = self._rows[first : first + self._batch_size]
            filled = np.concatenate([rows, np.repeat(self._rows[:1], self._batch_size - len(rows))])
            batch = build_batch(self._corpus, filled, 0, self._masking, self.SEED)
            batch.labels[len(rows) :] = IGNORED
            batch.positions[len(rows) :] = 0
            batch.sample_ids[len(rows) :] = -1
            yield batch
