"""Make batches of rows: masking, padding to few shapes.

The mask of a row is decided by (seed, epoch, row) alone, so every number of ranks sees the same samples and
the same masks for each global batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy, mask_tokens
from dga_scale.corpus.loading.mixture import Mixture, Picks
from dga_scale.corpus.loading.shapes import pack_positions, padded_length, rounded_up
from dga_scale.corpus.shards import Corpus


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


class RowCounts(NamedTuple):
    """The numbers of rows, of a global batch, that are padded to one length."""

    taken: int
    """The rows that a view's forward pass takes: packed ones where they are packed."""
    rows: int
    mixed: int
    """The rows of the corpora mixed in, which are among them."""


class StepShape(NamedTuple):
    """The shapes of the micro-batches of one optimizer step, of all ranks together."""

    rows_by_length: Mapping[int, RowCounts]
    labels_per_source: tuple[int, ...]
    """As in ``Counts``."""
    micro_steps: int

    @property
    def rows(self) -> int:
        """The number of rows of the global batch."""
        return sum(counts.rows for counts in self.rows_by_length.values())

    @property
    def num_labels(self) -> int:
        """The number of labels of the global batch, of all sources, without padding."""
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
