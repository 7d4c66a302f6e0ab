"""Make batches of rows: masking, padding to few shapes, each rank's part, prefetch.

The mask of a row is decided by (seed, epoch, row) alone, so every number of ranks sees the same samples and
the same masks for each global batch.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy, label_counts, mask_tokens
from dga_scale.corpus.loading.mixture import Mixture, Picks
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.loading.shapes import (
    assigned_rows,
    num_packed_rows,
    pack_positions,
    pack_rows,
    padded_length,
    rounded_up,
)
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError


class Batch(NamedTuple):
    """One micro-batch of one rank: B rows of T tokens with N labels; tensors of int64, all on one device.

    It goes to the model as it is: ``engine(batch, counts)``. A field's values are of one of three kinds of
    index. A *row* counts the B rows. A *position* is ``row * T + token``, an index of the flattened (B, T). A
    *label index* counts the N labels. T and N are rounded up to a few sizes (``corpus.loading.shapes``).
    """

    input_ids: torch.Tensor
    """(B, T) token ids as in the corpus, padded."""
    masked_ids: torch.Tensor
    """(B, T) token ids with masked tokens replaced; causal: the same as ``input_ids``."""
    attention_mask: torch.Tensor
    """(B, T) 1 at a real token, 0 at padding."""
    positions: torch.Tensor
    """(N,) the position that each label is predicted at, in rising order, then zeros up to N."""
    labels: torch.Tensor
    """(N,) the true ids there, then IGNORED; causal: the id after each position."""
    sample_ids: torch.Tensor
    """(B,) the index of each row in its corpus; -1 of a padding row."""
    sources: torch.Tensor
    """(B,) the corpus of each row: 0 the domain's, 1, ... those mixed in."""
    mixed_rows: torch.Tensor
    """(G,) the rows of the corpora mixed in, in rising order; [0] where there is none."""
    mixed_label_indices: torch.Tensor
    """(K,) the label indices of those rows' labels, in rising order, then -1."""
    packed_positions: torch.Tensor | None = None
    """(P, T) the position that each token of P packed rows holds, or -1; None: the rows are not packed."""
    padded: bool = True
    """Whether any row is shorter than T."""

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors to the model's device; to CUDA they are copied without waiting."""

        def to_device(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return Batch._make(map(to_device, self))

    @property
    def key_mask(self) -> torch.Tensor | None:
        """The attention mask where there is padding: to see that it masks nothing, a device is waited for."""
        return self.attention_mask if self.padded else None

    @property
    def label_rows(self) -> torch.Tensor:
        """(N,) the row of each label."""
        return self.positions // self.input_ids.shape[1]


class Counts(NamedTuple):
    """What a micro-batch's loss needs to know of the global batch that it is a part of."""

    labels_per_source: tuple[int, ...]
    """The number of labels of the global batch, over all ranks and accumulation steps, by source."""
    num_micro_batches: int
    """Ranks * gradient accumulation steps: the micro-batches that DeepSpeed averages gradients over. A sum
    over a micro-batch's labels, times this over the labels of the global batch, has the global mean as its
    mean."""

    @property
    def num_labels(self) -> int:
        """The number of labels of the global batch, of all sources."""
        return sum(self.labels_per_source)


def build_batch(
    corpus: Corpus,
    rows: np.ndarray,
    epochs: np.ndarray | int,
    masking: MaskingPolicy | None,
    seed: int,
    *,
    padding_rows: int = 0,
) -> Batch:
    """Make a batch of a corpus's rows.

    Args:
        corpus: The corpus that the rows are read from.
        rows: (B,) the rows' indices.
        epochs: (B,) or one for all: the epoch of each row, from which (with seed and row) its mask is drawn.
        masking: The masking policy; None for a causal model, whose labels are the next tokens.
        seed: The seed of the masks, 64 bits.
        padding_rows: The number of padding rows at the end, which get no labels.
    """
    length = padded_length(corpus.lengths[rows], corpus.manifest.sequence_length)
    read = _read(corpus, rows, epochs, masking, seed, length)
    sample_ids = np.array(rows, dtype=np.int64)
    if padding_rows:
        read.labels[-padding_rows:] = IGNORED
        sample_ids[-padding_rows:] = -1
    return _batch(read, sample_ids, np.zeros(len(rows), dtype=np.int64))


def mixed_batch(
    mixture: Mixture, picks: Picks, masking: MaskingPolicy | None, *, pack: bool = False
) -> Batch:
    """Make a batch of rows of several corpora, each masked as in its corpus alone.

    Args:
        mixture: The corpora.
        picks: The rows, in the batch's order.
        masking: The masking policy; None for a causal model.
        pack: Whether the rows are packed as well; see ``Batch.packed_positions``.

    """
    lengths = mixture.lengths(picks)
    length = padded_length(lengths, mixture.corpora[0].manifest.sequence_length)
    indices, parts = [], []
    for source, where in mixture.by_source(picks):
        own, seed = picks.part(where), mixture.orders[source].seed
        indices.append(where)
        parts.append(_read(mixture.corpora[source], own.rows, own.epochs, masking, seed, length))
    back = np.argsort(np.concatenate(indices))
    read = _Rows(*(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)))
    return _batch(read, picks.rows, picks.sources, pack_positions(lengths.tolist(), length) if pack else None)


class _Rows(NamedTuple):
    """Rows with their masks, (B, T) each."""

    ids: np.ndarray
    masked_ids: np.ndarray
    real: np.ndarray
    labels: np.ndarray  # IGNORED where nothing is predicted


def _read(
    corpus: Corpus,
    rows: np.ndarray,
    epochs: np.ndarray | int,
    masking: MaskingPolicy | None,
    seed: int,
    length: int,
) -> _Rows:
    ids = np.full((len(rows), length), corpus.manifest.special_ids.get("pad", 0), dtype=np.int64)
    lengths = np.empty(len(rows), dtype=np.int64)
    for number, row in enumerate(corpus.rows(rows)):
        lengths[number] = len(row)
        ids[number, : len(row)] = row
    real = np.arange(length) < lengths[:, None]
    if masking is None:
        labels = np.full_like(ids, IGNORED)
        labels[:, :-1] = np.where(real[:, 1:], ids[:, 1:], IGNORED)
        return _Rows(ids, ids, real, labels)
    return _Rows(ids, *mask_tokens(ids, real, rows, epochs, masking, seed))


def _batch(
    read: _Rows, sample_ids: np.ndarray, sources: np.ndarray, packed_positions: np.ndarray | None = None
) -> Batch:
    positions = np.flatnonzero(read.labels != IGNORED)
    label_rows = positions // read.ids.shape[1]
    mixed_rows, mixed_label_indices = np.flatnonzero(sources), np.flatnonzero(sources[label_rows])
    return Batch(
        input_ids=torch.from_numpy(read.ids),
        masked_ids=torch.from_numpy(read.masked_ids),
        attention_mask=torch.from_numpy(read.real.astype(np.int64)),
        positions=_padded(positions, 0),
        labels=_padded(read.labels.flat[positions], IGNORED),
        sample_ids=torch.from_numpy(sample_ids),
        sources=torch.from_numpy(sources),
        mixed_rows=torch.from_numpy(mixed_rows if len(mixed_rows) else np.zeros(1, dtype=np.int64)),
        mixed_label_indices=_padded(mixed_label_indices, -1),
        packed_positions=None if packed_positions is None else torch.from_numpy(packed_positions),
        padded=not bool(read.real.all()),
    )


def _padded(values: np.ndarray, padding: int) -> torch.Tensor:
    padded = np.full(int(rounded_up(len(values))), padding, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class StepBatches:
    """One rank's micro-batches of one optimizer step."""

    step: int
    micro_batches: list[Batch]
    counts: Counts
    """The counts of the global batch that they are a part of."""
    tokens_per_source: tuple[int, ...]
    """The number of real tokens of the global batch, by source."""
    rows_by_length: dict[int, int]
    """The number of rows of the global batch that a view's forward pass takes, packed where they are, by
    length."""
    head_positions: int
    """The number of positions of the global batch that go through the LM head, padding included."""


class BatchStream:
    """One rank's micro-batches, step after step, prepared ahead by a background thread.

    Step s trains on positions [s * G, (s + 1) * G) of the mixture, G the global batch size; micro-step m of
    all W ranks on [m * W * b, (m + 1) * W * b) of those, b the micro-batch size. Of corpora packed in chunks
    rank r takes the r-th part of these rows; documents are sorted by length, the longest first, and rank r
    takes the rows r, r + W, ... (``corpus.shapes``). At most ``prefetch`` steps are prepared ahead.

    Args:
        mixture: The corpora that are trained on.
        masking: The masking policy; None for a causal model.
        global_batch_size: G, in rows.
        micro_batch_size: b, in rows.
        rank: The rank r of this process.
        world_size: The number of ranks W.
        start_step: The first step.
        num_steps: The number of steps.
        prefetch: The number of steps that are prepared ahead.
        pack: Whether documents are packed; see ``Batch.packed_positions``. Chunks are full as they are.

    Example::

        with BatchStream(mixture, masking, global_batch_size=256, micro_batch_size=32, rank=0, world_size=4,
                         start_step=0, num_steps=1000) as stream:
            for batches in stream:
                ...

    Raises:
        UserError: The batch sizes do not divide, or a corpus has fewer rows than one global batch takes.
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
        pack: bool = False,
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
        self._pack = pack and mixture.corpora[0].manifest.packing != "chunk"
        self._steps = range(start_step, start_step + num_steps)
        self._queue: queue.SimpleQueue[StepBatches | BaseException] = queue.SimpleQueue()
        self._free_slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, step: int) -> StepBatches:
        """Return this rank's part of global batch ``step``."""
        mixture, masking = self._mixture, self._masking
        manifest = mixture.corpora[0].manifest  # packing and length are those of all
        picks = mixture.picks(step * self._global, (step + 1) * self._global)
        lengths, labels = mixture.lengths(picks), np.empty(len(picks.rows), dtype=np.int64)
        labels_per_source, tokens = [0] * len(mixture.corpora), [0] * len(mixture.corpora)
        for source, where in mixture.by_source(picks):
            labels[where] = label_counts(mixture.corpora[source], picks.rows[where], masking)
            labels_per_source[source] = int(labels[where].sum())
            tokens[source] = int(lengths[where].sum())
        rows = self._world_size * self._micro  # of one micro-step of all ranks
        parts = np.stack(
            [
                first + assigned_rows(lengths[first : first + rows], manifest.packing, self._world_size)
                for first in range(0, self._global, rows)
            ]
        )  # (accumulation steps, ranks, micro-batch)
        rows_by_length: dict[int, int] = {}
        for own in lengths[parts].reshape(-1, self._micro):
            length = padded_length(own, manifest.sequence_length)
            taken = self._micro
            if self._pack:
                taken = num_packed_rows(len(pack_rows(own.tolist(), length)), self._micro)
            rows_by_length[length] = rows_by_length.get(length, 0) + taken
        return StepBatches(
            step=step,
            micro_batches=[
                mixed_batch(mixture, picks.part(part), masking, pack=self._pack)
                for part in parts[:, self._rank]
            ],
            counts=Counts(tuple(labels_per_source), parts.shape[0] * parts.shape[1]),
            tokens_per_source=tuple(tokens),
            rows_by_length=rows_by_length,
            head_positions=int(rounded_up(labels[parts].sum(axis=2)).sum()),
        )

    def __iter__(self) -> Iterator[StepBatches]:
        assert self._thread is None, "a stream can be iterated over once"
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
        except BaseException as error:  # it is raised again where the batch is asked for
            self._queue.put(error)


class EvalBatches:
    """Every row once with fixed masks, split over ranks; all ranks get the same number of batches.

    Batch n of rank r holds rows [(n * world_size + r) * b, ...) of a fixed order, the longest first: rows of
    one batch are about equally long. Where rows run out, a batch is filled up with padding rows: repeated
    rows that have no labels (sample_ids -1). Iterating again gives the same.

    Args:
        corpus: The corpus that is evaluated.
        masking: The masking policy; None for a causal model.
        batch_size: The number of rows of a batch.
        rank: The rank of this process.
        world_size: The number of ranks.
        max_rows: The most rows that are evaluated, a fixed sample of the corpus; None: all.
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
        self.rows = np.sort(SampleOrder(len(corpus), self.SEED).indices(0, count))
        """The rows that are evaluated, in rising order."""
        self._by_length = self.rows[np.argsort(-corpus.lengths[self.rows].astype(np.int64), kind="stable")]

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.rows) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._world_size + self._rank) * self._batch_size
            rows = self._by_length[first : first + self._batch_size]
            padding_rows = self._batch_size - len(rows)
            filled = np.concatenate([rows, np.repeat(self._by_length[-1:], padding_rows)])
            yield build_batch(self._corpus, filled, 0, self._masking, self.SEED, padding_rows=padding_rows)
