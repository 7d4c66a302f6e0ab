"""Masking, batches and the stream: the same for any number of ranks, resumable at any step."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dga_scale.corpus.loading.batches import build_batch
from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy, label_counts, masked_count
from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.loading.shapes import num_packed_rows, pack_positions, pack_rows, rounded_up
from dga_scale.corpus.loading.streams import BatchStream, EvalBatches, StepBatches
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny
from tests.helpers.batches import contents, dense_labels, joined

LENGTH = 48
GLOBAL = 16


def make(tokenizer: Path, folder: Path, packing: str) -> Corpus:
    path = tiny.write_jsonl(folder / "a.jsonl", tiny.texts(900))
    settings = ShardSettings(str(tokenizer), sequence_length=LENGTH, packing=packing, shard_size=0.02)
    shard_corpus([str(path)], folder / "corpus", settings)
    return Corpus.open(folder / "corpus")


@pytest.fixture(scope="module")
def corpus(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Rows of many lengths, for masked LM."""
    return make(wordpiece, tmp_path_factory.mktemp("masked"), "document")


@pytest.fixture(scope="module")
def causal(byte_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Rows of many lengths, for causal LM."""
    return make(byte_bpe, tmp_path_factory.mktemp("causal"), "document")


@pytest.fixture
def masking(corpus: Corpus) -> MaskingPolicy:
    """The usual policy."""
    return MaskingPolicy.for_corpus(corpus, probability=0.15)


@pytest.fixture(scope="module")
def chunks(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Rows of one length, but the last."""
    return make(wordpiece, tmp_path_factory.mktemp("chunks"), "chunk")


def stream(
    corpus: Corpus, masking: MaskingPolicy | None, rank: int = 0, world_size: int = 1, **changes: int
) -> BatchStream:
    options = {"global_batch_size": GLOBAL, "micro_batch_size": 4, "start_step": 0, "num_steps": 5, **changes}
    return BatchStream(Mixture([corpus], [], seed=7), masking, rank=rank, world_size=world_size, **options)


# --- masking ---


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5])
def test_masked_count(probability: float) -> None:
    maskable = np.arange(200)
    expected = [0] + [max(1, round(probability * n)) for n in range(1, 200)]
    assert masked_count(maskable, probability).tolist() == expected


def test_every_row_is_masked_as_told(corpus: Corpus, masking: MaskingPolicy) -> None:
    rows = np.arange(len(corpus))
    batch = build_batch(corpus, rows, 0, masking, seed=1)
    special, labels = set(corpus.manifest.all_special_ids), dense_labels(batch)
    shape = (len(corpus), LENGTH)
    assert batch.input_ids.shape == batch.masked_ids.shape == batch.attention_mask.shape == shape
    assert all(t.dtype == torch.int64 for t in batch if isinstance(t, torch.Tensor))
    counts = label_counts(corpus, rows, masking)
    for index in rows:
        ids = corpus.row(index).tolist()
        padding = LENGTH - len(ids)
        assert batch.input_ids[index].tolist() == ids + [0] * padding
        assert batch.attention_mask[index].tolist() == [1] * len(ids) + [0] * padding
        ordinary = sum(i not in special for i in ids)
        count = max(1, round(0.15 * ordinary))
        positions = np.flatnonzero(labels[index] != IGNORED)
        assert counts[index] == count == len(positions)
        assert labels[index, positions].tolist() == [ids[p] for p in positions]
        assert not special & set(labels[index, positions].tolist())
        changed = np.flatnonzero(batch.masked_ids[index].numpy() != batch.input_ids[index].numpy())
        assert set(changed) <= set(positions)
    total = int(counts.sum())
    assert len(batch.labels) == len(batch.positions) == rounded_up(total)
    assert torch.equal(batch.positions[:total], batch.positions[:total].unique())  # rising
    assert (batch.labels[total:] == IGNORED).all()
    assert not batch.positions[total:].any()


def test_positions_and_replacements_are_drawn_evenly(corpus: Corpus, masking: MaskingPolicy) -> None:
    # One row that fills its length, in many epochs.
    row = int(np.argmax(corpus.maskable))
    ids = corpus.row(row)
    trials = 4000
    batch = build_batch(corpus, np.full(trials, row), np.arange(trials), masking, seed=1)
    labelled = dense_labels(batch) != IGNORED
    places = labelled.sum(dim=0).numpy()
    maskable = ~masking.is_special[ids]
    assert places[: len(ids)][~maskable].sum() == 0
    assert stats.chisquare(places[: len(ids)][maskable]).pvalue > 1e-3

    at, labels = batch.masked_ids[labelled], batch.input_ids[labelled]
    total = len(labels)
    as_mask = (at == masking.mask_token_id).sum().item()
    as_other = ((at != masking.mask_token_id) & (at != labels)).sum().item()
    # A random token is the right one now and then.
    share = 0.1 * (1 - 1 / len(masking.ordinary_ids))
    assert stats.binomtest(as_mask, total, 0.8).pvalue > 1e-3
    assert stats.binomtest(as_other, total, share).pvalue > 1e-3
    others = at[(at != masking.mask_token_id) & (at != labels)].numpy()
    assert not set(others) & set(masking.special_ids)
    assert len(set(others)) > 0.9 * (masking.vocab_size - len(masking.special_ids))


@pytest.mark.parametrize(("mask", "other"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_of_replacements_at_their_ends(mask: float, other: float, corpus: Corpus) -> None:
    masking = MaskingPolicy.for_corpus(corpus, 0.15, mask_replace_prob=mask, random_replace_prob=other)
    batch = build_batch(corpus, np.arange(200), 0, masking, seed=1)
    labelled = dense_labels(batch) != IGNORED
    at, labels = batch.masked_ids[labelled], batch.input_ids[labelled]
    assert ((at == masking.mask_token_id).float().mean() == 1.0) == (mask == 1.0)
    assert ((at == labels).float().mean() == 1.0) == (mask == other == 0.0)


def test_a_mask_depends_on_seed_epoch_and_row_alone(corpus: Corpus, masking: MaskingPolicy) -> None:
    """Not on the order of rows, nor on what they are padded to."""
    rows = np.arange(40)
    together = build_batch(corpus, rows, 3, masking, seed=1)
    lengths_taken = set()
    for row in (*np.argsort(corpus.lengths[:40])[[0, 1, 20, 39]], 17):
        alone = build_batch(corpus, np.array([row]), 3, masking, seed=1)
        lengths_taken.add(alone.input_ids.shape[1])
        assert contents(alone)[0, row] == contents(together)[0, row]
    assert lengths_taken == {32, LENGTH}
    backwards = build_batch(corpus, rows[::-1], 3, masking, seed=1)
    assert contents(backwards) == contents(together)
    mixed = build_batch(corpus, rows, rows % 5, masking, seed=1)
    assert torch.equal(mixed.masked_ids[3], together.masked_ids[3])
    for other in (
        build_batch(corpus, rows, 4, masking, seed=1),
        build_batch(corpus, rows, 3, masking, seed=2),
    ):
        assert not torch.equal(other.positions, together.positions)


def test_causal_batches_predict_the_next_token(causal: Corpus) -> None:
    rows = np.arange(50)
    batch = build_batch(causal, rows, 0, None, seed=1)
    assert torch.equal(batch.masked_ids, batch.input_ids)
    counts, labels = label_counts(causal, rows, None), dense_labels(batch)
    for index in rows:
        ids = causal.row(index).tolist()
        assert labels[index].tolist() == ids[1:] + [IGNORED] * (LENGTH - len(ids) + 1)
        assert counts[index] == len(ids) - 1
    total = int(counts.sum())
    assert len(batch.positions) == rounded_up(total)
    assert (batch.labels[:total] != IGNORED).all()


def test_masked_lm_needs_a_mask_token(causal: Corpus) -> None:
    with pytest.raises(UserError, match=r"whose tokenizer has no mask token: masked LM is not possible"):
        MaskingPolicy.for_corpus(causal, 0.15)


# --- the stream ---


def read(per_rank: list[StepBatches]) -> list[dict[tuple[int, int], tuple[list[int], ...]]]:
    """What each pass of all ranks reads, row by row."""
    return [
        contents(joined([step.micro_batches[number] for step in per_rank]))
        for number in range(len(per_rank[0].micro_batches))
    ]


def all_of(per_rank: list[StepBatches]) -> dict[tuple[int, int], tuple[list[int], ...]]:
    """The global batch, row by row."""
    return {row: content for each in read(per_rank) for row, content in each.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_all_world_sizes_see_the_same(
    world_size: int, micro: int, corpus: Corpus, masking: MaskingPolicy
) -> None:
    order = SampleOrder(len(corpus), 7)
    rows, epochs = order.indices(2 * GLOBAL, 3 * GLOBAL), order.epochs(2 * GLOBAL, 3 * GLOBAL)
    reference = build_batch(corpus, rows, epochs, masking, seed=7)
    ranks = [
        list(stream(corpus, masking, rank, world_size, micro_batch_size=micro, num_steps=3))
        for rank in range(world_size)
    ]
    seen = [steps[2] for steps in ranks]
    accumulation = GLOBAL // (micro * world_size)
    assert [len(step.micro_batches) for step in seen] == [accumulation] * world_size
    assert all_of(seen) == contents(reference)
    # A micro-batch holds a stretch of the order, whatever its lengths: several are not sorted together.
    for each, stretch in zip(read(seen), rows.reshape(accumulation, -1), strict=True):
        assert {row for _, row in each} == set(stretch.tolist())
    for step in seen:
        assert step.step == 2
        assert step.counts.labels_per_source == ((reference.labels != IGNORED).sum(),)
        assert step.tokens_per_source == (reference.attention_mask.sum(),)
        parts = [batch for own in seen for batch in own.micro_batches]
        assert (step.shape.rows, step.shape.micro_steps) == (GLOBAL, accumulation)
        assert step.shape.num_labels == step.counts.num_labels
        lengths_taken = [batch.input_ids.shape[1] for batch in parts for _ in range(micro)]
        rows = {width: lengths_taken.count(width) for width in set(lengths_taken)}
        assert step.shape.rows_by_length == {width: (count, count, 0) for width, count in rows.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_documents_are_distributed_by_length(world_size: int, corpus: Corpus, masking: MaskingPolicy) -> None:
    """Ranks alternate in the sorted rows; a batch is as long as its longest, in steps of 32."""
    micro = GLOBAL // world_size
    ranks = [
        stream(corpus, masking, rank, world_size, micro_batch_size=micro, num_steps=3, pack=True)
        for rank in range(world_size)
    ]
    for steps in zip(*ranks, strict=True):
        batches = [step.micro_batches[0] for step in steps]
        read: dict[int, int] = {}
        lengths = [batch.attention_mask.sum(dim=1).tolist() for batch in batches]
        interleaved = [length for turn in zip(*lengths, strict=True) for length in turn]
        assert interleaved == sorted(interleaved, reverse=True)
        for batch, own in zip(batches, lengths, strict=True):
            width = min(rounded_up(max(own)), LENGTH)
            assert batch.input_ids.shape == (micro, width)
            assert batch.padded
            # Each real token has one place in the packed rows, which are fewer.
            assert batch.packed_positions is not None
            assert batch.packed_positions.shape[1] == width
            assert sum(own) / width <= len(batch.packed_positions) < micro
            real = batch.attention_mask.flatten().nonzero().flatten()
            assert batch.packed_positions[batch.packed_positions >= 0].sort().values.equal(real)
            read[width] = read.get(width, 0) + len(batch.packed_positions)
        by_length = steps[0].shape.rows_by_length
        assert {width: rows.taken for width, rows in by_length.items()} == read
        assert steps[0].shape.rows == GLOBAL
        assert all(step.shape == steps[0].shape for step in steps)


def test_rows_are_put_where_they_leave_least_room() -> None:
    assert pack_rows([9, 7, 5, 3, 3, 1], 10) == [[0, 5], [1, 3], [2, 4]]
    assert pack_rows([4, 4, 4], 4) == [[0], [1], [2]]
    assert pack_positions([3, 2, 1], 4).tolist() == [[0, 1, 2, 8], [4, 5, -1, -1]]
    generator = np.random.default_rng(0)
    for lengths in generator.integers(1, 129, (50, 64)):
        rows = pack_rows(sorted(lengths.tolist(), reverse=True), 128)
        assert sorted(row for own in rows for row in own) == list(range(64))
        fewest = -(-int(lengths.sum()) // 128)
        assert len(rows) <= fewest * 11 / 9 + 1


def test_few_numbers_of_packed_rows_occur() -> None:
    for rows in (1, 16, 64, 100):
        sizes = {num_packed_rows(number, rows) for number in range(1, rows + 1)}
        assert len(sizes) <= 16
        assert all(0 <= num_packed_rows(n, rows) - n < -(-rows // 16) for n in range(1, rows + 1))
    assert pack_positions([100] * 33 + [28] * 33, 128).shape == (35, 128)


def test_chunks_go_to_ranks_in_consecutive_parts(chunks: Corpus) -> None:
    masking, order = MaskingPolicy.for_corpus(chunks, 0.15), SampleOrder(len(chunks), 7)
    longest = chunks.manifest.sequence_length
    assert (chunks.lengths == longest).mean() > 0.9  # some end a piece of the text
    for rank in range(2):
        for step in stream(chunks, masking, rank, 2, num_steps=2, pack=True):
            for number, batch in enumerate(step.micro_batches):
                first = step.step * GLOBAL + (2 * number + rank) * 4
                assert batch.sample_ids.tolist() == order.indices(first, first + 4).tolist()
                assert batch.input_ids.shape == (4, longest)
                assert batch.padded == bool((chunks.lengths[batch.sample_ids.numpy()] < longest).any())
                assert batch.packed_positions is None
                assert len(batch.labels) == rounded_up(4 * 7) == 32


def test_resume_at_any_step_on_another_world_size(corpus: Corpus, masking: MaskingPolicy) -> None:
    # Long enough to come to the second epoch.
    total = len(corpus) // GLOBAL + 4
    whole = [all_of([step]) for step in stream(corpus, masking, num_steps=total)]
    for start, world_size in ((1, 2), (total - 6, 4), (total - 1, 1)):
        ranks = [
            list(stream(corpus, masking, rank, world_size, start_step=start, num_steps=total - start))
            for rank in range(world_size)
        ]
        for number, parts in enumerate(zip(*ranks, strict=True)):
            assert all_of(list(parts)) == whole[start + number], (start, number)


def test_an_epoch_shows_every_row_once_and_masks_it_anew_in_the_next(
    corpus: Corpus, masking: MaskingPolicy
) -> None:
    seen = [
        entry
        for step in stream(corpus, masking, num_steps=2 * len(corpus) // GLOBAL)
        for batch in step.micro_batches
        for entry in contents(batch).items()
    ]
    first = [row for (_, row), _ in seen[: len(corpus) // GLOBAL * GLOBAL]]
    assert len(set(first)) == len(first)
    longest = int(np.argmax(corpus.maskable))
    masked = [masked_ids for (_, row), (_, masked_ids, _) in seen if row == longest]
    assert len(masked) == 2
    assert masked[0] != masked[1]


def test_prefetch_runs_ahead_in_the_background_and_no_further(corpus: Corpus, masking: MaskingPolicy) -> None:
    built: list[int] = []
    batches = stream(corpus, masking, num_steps=20, prefetch=3)
    build = batches.step
    batches.step = lambda step: (built.append(step), build(step))[1]  # type: ignore[method-assign]
    iterator = iter(batches)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(built) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert built == [0, 1, 2, 3]
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_leaving_the_loop_ends_the_thread(corpus: Corpus, masking: MaskingPolicy) -> None:
    with stream(corpus, masking, num_steps=1000) as batches:
        for batch in batches:
            if batch.step == 2:
                break
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_an_error_in_the_background_is_raised_where_batches_are_read(
    corpus: Corpus, masking: MaskingPolicy
) -> None:
    broken = Corpus(corpus.path / "gone", corpus.manifest)
    broken.lengths, broken.maskable = corpus.lengths, corpus.maskable
    with pytest.raises(UserError, match="no shard of a corpus"):
        next(iter(stream(broken, masking)))
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_batch_sizes_that_do_not_divide(corpus: Corpus, masking: MaskingPolicy) -> None:
    with pytest.raises(UserError, match=r"global batch size 16 is not a multiple of 3 \(micro-batch\) x 2"):
        stream(corpus, masking, world_size=2, micro_batch_size=3)


def test_corpus_smaller_than_a_global_batch(corpus: Corpus, masking: MaskingPolicy) -> None:
    size = 4 * (len(corpus) // 4 + 1)
    with pytest.raises(UserError, match=rf"has {len(corpus)} rows, fewer than one global batch of {size}"):
        stream(corpus, masking, global_batch_size=size)


# --- evaluation ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [None, 50, 10**6])
def test_evaluation_covers_every_row_once(
    world_size: int, max_rows: int | None, corpus: Corpus, masking: MaskingPolicy
) -> None:
    ranks = [
        EvalBatches(corpus, masking, batch_size=7, rank=rank, world_size=world_size, max_rows=max_rows)
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    assert len({len(rank) for rank in ranks}) == 1
    assert [len(rank) for rank in ranks] == [len(b) for b in batches]
    assert {b.input_ids.shape for part in batches for b in part} == {(7, 32), (7, LENGTH)}
    ids = torch.cat([b.sample_ids for part in batches for b in part])
    real = ids[ids >= 0]
    assert len(real) == len(set(real.tolist())) == min(len(corpus), max_rows or len(corpus))
    counts = torch.cat([(dense_labels(b) != IGNORED).sum(dim=1) for part in batches for b in part])
    assert (counts[ids < 0] == 0).all()
    assert (counts[ids >= 0] > 0).all()
    in_order = [part[number] for number in range(len(ranks[0])) for part in batches]
    lengths = torch.cat([b.attention_mask.sum(dim=1)[b.sample_ids >= 0] for b in in_order]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    # A row with nothing to attend to would give NaN in softmax.
    assert all((b.attention_mask.sum(1) > 0).all() for part in batches for b in part)


def test_evaluation_masks_are_fixed(corpus: Corpus, masking: MaskingPolicy) -> None:
    def masks(world_size: int) -> dict[int, list[int]]:
        return {
            row: masked_ids
            for rank in range(world_size)
            for batch in EvalBatches(corpus, masking, batch_size=5, rank=rank, world_size=world_size)
            for (_, row), (_, masked_ids, _) in contents(batch).items()
            if row >= 0
        }

    assert masks(1) == masks(1) == masks(3)


def test_nothing_to_evaluate(corpus: Corpus, masking: MaskingPolicy) -> None:
    empty = Corpus(corpus.path, replace(corpus.manifest, shards=()))
    with pytest.raises(UserError, match="has no rows to evaluate"):
        EvalBatches(empty, masking, batch_size=5, rank=0, world_size=1)
