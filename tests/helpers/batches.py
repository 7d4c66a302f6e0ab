"""Batches taken apart row by row and put together again: labels are flat in a batch, and rows padded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.corpus.loading.shapes import rounded_up


def batch_of(
    input_ids: Tensor,
    masked_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    sample_ids: Tensor | None = None,
    sources: Tensor | None = None,
    packed_positions: Tensor | None = None,
) -> Batch:
    """A batch of rows (B, T) with labels (B, T), IGNORED where nothing is predicted."""
    rows = len(input_ids)
    sources = torch.zeros(rows, dtype=torch.long) if sources is None else sources
    positions = (labels.flatten() != IGNORED).nonzero().flatten()
    mixed_rows = (sources > 0).nonzero().flatten()
    mixed_label_indices = (sources[positions // input_ids.shape[1]] > 0).nonzero().flatten()
    return Batch(
        input_ids=input_ids,
        masked_ids=masked_ids,
        attention_mask=attention_mask,
        positions=_filled(positions, 0),
        labels=_filled(labels.flatten()[positions], IGNORED),
        sample_ids=torch.arange(rows) if sample_ids is None else sample_ids,
        sources=sources,
        mixed_rows=mixed_rows if len(mixed_rows) else torch.zeros(1, dtype=torch.long),
        mixed_label_indices=_filled(mixed_label_indices, -1),
        packed_positions=packed_positions,
        padded=not bool(attention_mask.all()),
    )


def counts_of(batch: Batch, sources: int = 1, *, num_micro_batches: int = 1) -> Counts:
    """Counts of the global batch ``batch``, of which so many micro-batches are made.

    ``sources``: 1 counts all rows as one corpus.
    """
    of_rows = (dense_labels(batch) != IGNORED).sum(dim=1)
    own = batch.sources if sources > 1 else torch.zeros_like(batch.sources)
    return Counts(tuple(int(of_rows[own == source].sum()) for source in range(sources)), num_micro_batches)


def _filled(values: Tensor, padding: int) -> Tensor:
    return torch.cat([values, values.new_full((int(rounded_up(len(values))) - len(values),), padding)])


def dense_labels(batch: Batch) -> Tensor:
    """Labels (B, T), IGNORED where nothing is predicted."""
    dense = torch.full_like(batch.input_ids, IGNORED)
    real = batch.labels != IGNORED
    dense.view(-1)[batch.positions[real]] = batch.labels[real]
    return dense


def masked_places(batch: Batch) -> list[list[int]]:
    """Positions with a label, of each row."""
    return [(row != IGNORED).nonzero().flatten().tolist() for row in dense_labels(batch)]


def rows_of(batch: Batch, rows: slice | list[int] | Tensor) -> Batch:
    """Some rows of a batch, as long as all; not packed."""
    return batch_of(
        batch.input_ids[rows],
        batch.masked_ids[rows],
        batch.attention_mask[rows],
        dense_labels(batch)[rows],
        sample_ids=batch.sample_ids[rows],
        sources=batch.sources[rows],
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, padded to the longest."""
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def all_rows(tensors: Sequence[Tensor], padding: int) -> Tensor:
        return torch.cat(
            [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=padding) for t in tensors]
        )

    return batch_of(
        all_rows([b.input_ids for b in batches], 0),
        all_rows([b.masked_ids for b in batches], 0),
        all_rows([b.attention_mask for b in batches], 0),
        all_rows([dense_labels(b) for b in batches], IGNORED),
        sample_ids=torch.cat([b.sample_ids for b in batches]),
        sources=torch.cat([b.sources for b in batches]),
    )


def without_labels(batch: Batch, rows: slice | list[int] | int) -> Batch:
    """The batch, nothing of some rows predicted."""
    labels = dense_labels(batch)
    labels[rows] = IGNORED
    return batch_of(
        batch.input_ids,
        batch.masked_ids,
        batch.attention_mask,
        labels,
        sample_ids=batch.sample_ids,
        sources=batch.sources,
        packed_positions=batch.packed_positions,
    )


def contents(batch: Batch) -> dict[tuple[int, int], tuple[list[int], list[int], list[int]]]:
    """By corpus and row: its ids, masked ids and labels, without padding."""
    labels, found = dense_labels(batch), {}
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        parts = (t[row, :length].tolist() for t in (batch.input_ids, batch.masked_ids, labels))
        assert not batch.attention_mask[row, length:].any()
        found[int(batch.sources[row]), int(batch.sample_ids[row])] = tuple(parts)
    return found
