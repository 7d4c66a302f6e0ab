"""Read batches step after step: each rank's part of the global batch, prefetched; and those to evaluate."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dga_scale.corpus.loading.batches import Batch, Counts, RowCounts, StepShape, build_batch, mixed_batch
from dga_scale.corpus.loading.masking import MaskingPolicy, label_counts
from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.loading.shapes import (
    assigned_rows,
    num_packed_rows,
    pack_rows,
    padded_length,
)
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError


@dataclass(frozen=True)
class StepBatches:
    """One rank's micro-batches of one optimizer step."""

    step: int
    micro_batches: list[Batch]
    counts: Counts
    """The counts of the global batch that they are a part of."""
    tokens_per_source: tuple[int, ...]
    """The number of real tokens of the global batch, by source."""
    shape: StepShape
    """The shapes of the global batch."""


class BatchStream:
    """One rank's micro-batches, step after step, prepared ahead by a background thread.

    Step s trains on positions [s * G, (s + 1) * G) of the mixture, G the global batch size; micro-step m of
    all W ranks on [m * W * b, (m + 1) * W * b) of those, b the micro-batch size. Of corpora packed in chunks
    rank r takes the r-th part of these rows; documents are sorted by length, the longest first, and rank r
    takes the rows r, r + W, ... (``corpus.loading.shapes``). At most ``prefetch`` steps are prepared ahead.

    Args:
        mixture: The corpora that are trained on.
        masking: The masking policy; None for a causal model.
        global_batch_size: G, in rows.
        micro_batch_size: The micro-batch size b, in rows.
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
        lengths = mixture.lengths(picks)
        labels_per_source, tokens = [0] * len(mixture.corpora), [0] * len(mixture.corpora)
        for source, where in mixture.by_source(picks):
            labels = label_counts(mixture.corpora[source], picks.rows[where], masking)
            labels_per_source[source] = int(labels.sum())
            tokens[source] = int(lengths[where].sum())
        rows = self._world_size * self._micro  # of one micro-step of all ranks
        parts = np.stack(
            [
                first + assigned_rows(lengths[first : first + rows], manifest.packing, self._world_size)
                for first in range(0, self._global, rows)
            ]
        )  # (accumulation steps, ranks, micro-batch)
        rows_by_length: dict[int, RowCounts] = {}
        for part in parts.reshape(-1, self._micro):
            own = lengths[part]
            length = padded_length(own, manifest.sequence_length)
            taken = self._micro
            if self._pack:
                taken = num_packed_rows(len(pack_rows(own.tolist(), length)), self._micro)
            before = rows_by_length.get(length, RowCounts(0, 0, 0))
            more = RowCounts(taken, self._micro, int(np.count_nonzero(picks.sources[part])))
            rows_by_length[length] = RowCounts(*map(sum, zip(before, more, strict=True)))
        return StepBatches(
            step=step,
            micro_batches=[
                mixed_batch(mixture, picks.part(part), masking, pack=self._pack)
                for part in parts[:, self._rank]
            ],
            counts=Counts(tuple(labels_per_source), parts.shape[0] * parts.shape[1]),
            tokens_per_source=tuple(tokens),
            shape=StepShape(rows_by_length, tuple(labels_per_source), len(parts)),
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
                "it has no rows to evaluate. Hold out more: tools/shard_corpus.py --validation_share",
                corpus.path,
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
