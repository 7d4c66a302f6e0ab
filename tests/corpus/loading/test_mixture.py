"""The mixture of corpora: exact shares, no ranks in it, any step by its number, and nothing new for one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dga_scale.corpus.loading.batches import build_batch
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.mixture import Mixture, parse_mix, source_seed
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.loading.streams import BatchStream
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError
from tests.helpers import tiny_corpora as tiny
from tests.helpers.batches import contents, dense_labels, joined, rows_of

LENGTH = 48
GLOBAL = 16
SEED = 7


def make(tokenizer: Path, folder: Path, name: str, rows: int, words: tuple[int, int]) -> Corpus:
    documents = tiny.texts(rows, seed=rows, words=words)
    path = tiny.write_jsonl(folder / f"{name}.jsonl", documents)
    settings = ShardSettings(str(tokenizer), sequence_length=LENGTH, packing="document", shard_size=0.02)
    shard_corpus([str(path)], folder / name, settings)
    return Corpus.open(folder / name)


@pytest.fixture(scope="module")
def corpora(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """The run's corpus; one of long rows; a small one of short rows, which a run reads many times."""
    folder = tmp_path_factory.mktemp("mixed")
    return [
        make(wordpiece, folder, "domain", 700, (1, 40)),
        make(wordpiece, folder, "general", 300, (20, 60)),
        make(wordpiece, folder, "small", 12, (1, 6)),
    ]


@pytest.fixture
def masking(corpora: list[Corpus]) -> MaskingPolicy:
    """The usual policy."""
    return MaskingPolicy.for_corpus(corpora[0], probability=0.15)


def stream(
    mixture: Mixture,
    masking: MaskingPolicy,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    stop: int = 5,
) -> BatchStream:
    return BatchStream(
        mixture,
        masking,
        global_batch_size=GLOBAL,
        micro_batch_size=4,
        rank=rank,
        world_size=world_size,
        start_step=start,
        num_steps=stop - start,
    )


@pytest.mark.parametrize("shares", [[0.05], [0.5], [0.93], [0.3, 0.02], [0.45, 0.45]])
def test_every_prefix_has_its_shares_of_the_tokens(shares: list[float], corpora: list[Corpus]) -> None:
    mixture = Mixture(corpora[: len(shares) + 1], shares, SEED)
    count = 6000  # the smallest corpus comes round more than once
    picks = mixture.picks(0, count)
    lengths = np.array(
        [mixture.corpora[s].lengths[r] for s, r in zip(picks.sources, picks.rows, strict=True)]
    )
    total = np.cumsum(lengths)
    for source, share in enumerate([1 - sum(shares), *shares]):
        own = np.cumsum(lengths * (picks.sources == source))
        assert np.abs(own - share * total).max() <= LENGTH, source
    assert picks.epochs.max() >= 2


def test_each_source_is_read_in_its_own_order_as_if_it_were_alone(
    corpora: list[Corpus], masking: MaskingPolicy
) -> None:
    mixture = Mixture(corpora, [0.4, 0.1], SEED)
    batch = joined([b for step in stream(mixture, masking, stop=30) for b in step.micro_batches])
    assert source_seed(SEED, 0) == SEED
    for source, corpus in enumerate(corpora):
        seed = source_seed(SEED, source)
        own = rows_of(batch, batch.sources == source)
        order, count = SampleOrder(len(corpus), seed), len(own.sample_ids)
        rows, epochs = order.indices(0, count), order.epochs(0, count)
        assert count > 20
        assert sorted(own.sample_ids.tolist()) == sorted(rows.tolist())
        last = epochs == epochs[-1]  # in one epoch a row is read once
        alone = contents(build_batch(corpus, rows[last], epochs[last], masking, seed))
        ours = contents(own)  # of a row read several times, what it was the last time
        assert {row: ours[source, row] for _, row in alone} == {row: of for (_, row), of in alone.items()}
    assert len({source_seed(SEED, source) for source in range(3)}) == 3


def test_a_mixture_of_one_is_the_corpus(corpora: list[Corpus], masking: MaskingPolicy) -> None:
    corpus = corpora[2]  # many epochs
    order = SampleOrder(len(corpus), SEED)
    mixture = Mixture([corpus], [], SEED)
    assert mixture.content_hash == corpus.content_hash
    for start, stop in ((0, 5), (3, 40), (1000, 1010)):
        picks = mixture.picks(start, stop)
        assert picks.sources.tolist() == [0] * (stop - start)
        assert picks.rows.tolist() == order.indices(start, stop).tolist()
        assert picks.epochs.tolist() == order.epochs(start, stop).tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_world_sizes_see_the_same(world_size: int, corpora: list[Corpus], masking: MaskingPolicy) -> None:
    shares = [0.4, 0.1]
    alone = list(stream(Mixture(corpora, shares, SEED), masking))
    ranks = [
        list(stream(Mixture(corpora, shares, SEED), masking, rank, world_size)) for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        expected = joined(whole.micro_batches)
        micro = [part.micro_batches[n] for n in range(len(parts[0].micro_batches)) for part in parts]
        assert contents(joined(micro)) == contents(expected)
        for source in range(3):
            rows = expected.sources == source
            masked = int((dense_labels(expected)[rows] != -100).sum())
            tokens = int(expected.attention_mask[rows].sum())
            for part in (whole, *parts):
                assert part.counts.labels_per_source[source] == masked
                assert part.tokens_per_source[source] == tokens
        for part in (whole, *parts):
            assert part.shape.labels_per_source == part.counts.labels_per_source
            mixed = sum(rows.mixed for rows in part.shape.rows_by_length.values())
            assert mixed == (expected.sources > 0).sum()


def test_a_step_follows_from_its_number_alone(
    corpora: list[Corpus], masking: MaskingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, last = [0.4, 0.1], 40
    whole = [
        joined(step.micro_batches) for step in stream(Mixture(corpora, shares, SEED), masking, stop=last)
    ]
    for block in (37, 1 << 16):
        monkeypatch.setattr("dga_scale.corpus.loading.mixture._BLOCK", block)
        resumed = stream(Mixture(corpora, shares, SEED), masking, start=31, stop=last)
        for number, step in enumerate(resumed, 31):
            assert contents(joined(step.micro_batches)) == contents(whole[number])
    back = Mixture(corpora, shares, SEED)
    back.picks(500, 600)
    assert sorted(back.picks(16, 32).rows.tolist()) == sorted(whole[1].sample_ids.tolist())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("a/b:0.05", ("a/b", 0.05)), ("C:/x y:0.5", ("C:/x y", 0.5)), ("g:1e-2", ("g", 0.01))],
)
def test_a_spec_is_read(spec: str, expected: tuple[str, float]) -> None:
    path, share = parse_mix(spec)
    assert (str(path), share) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("corpora/general", "corpora/general: not of the form PATH:SHARE"),
        (":0.1", ":0.1: not of the form"),
        ("general:a lot", "not of the form"),
        ("general:nan", "not of the form"),
        ("general:0", "the share must lie between 0 and 1, it is 0"),
        ("general:5", "it is 5"),
    ],
)
def test_a_spec_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mix(spec)


def test_shares_that_leave_nothing(corpora: list[Corpus]) -> None:
    with pytest.raises(UserError, match=r"general: its share 1 must lie between 0 and 1"):
        Mixture(corpora[:2], [1.0], SEED)
    with pytest.raises(UserError, match=r"0\.7 \+ 0\.3 = 1 of the tokens, which leaves nothing for .*domain"):
        Mixture(corpora, [0.7, 0.3], SEED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_hash": "x"}, r"/other: it was made with the tokenizer of '.*', .*/domain with that of"),
        ({"sequence_length": 64}, r"/other: it has sequence_length 64, .*/domain has 48"),
        ({"packing": "chunk"}, r"/other: it has packing chunk, .*/domain has document"),
        ({"shards": ()}, r"/other: it has no rows"),
    ],
)
def test_corpora_that_do_not_go_together(
    changes: dict[str, object], message: str, corpora: list[Corpus]
) -> None:
    other = Corpus(corpora[1].path.with_name("other"), replace(corpora[1].manifest, **changes))
    with pytest.raises(UserError, match=message):
        Mixture([corpora[0], other], [0.1], SEED)


def test_a_corpus_is_given_once(corpora: list[Corpus]) -> None:
    copy = Corpus(corpora[0].path.with_name("copy"), corpora[0].manifest)
    with pytest.raises(UserError, match=r"/copy: it is the same as .*/domain"):
        Mixture([*corpora[:2], copy], [0.1, 0.1], SEED)


def test_a_corpus_too_small_for_its_part_of_a_batch(corpora: list[Corpus]) -> None:
    Mixture(corpora, [0.1, 0.1], SEED).check_one_batch(16)
    with pytest.raises(UserError, match=r"small: it has 11 rows, fewer than the \d\d that its share of 0\.5"):
        Mixture(corpora, [0.1, 0.5], SEED).check_one_batch(16)
    with pytest.raises(UserError, match=r"small: it has 11 rows, fewer than one global batch of 16"):
        Mixture(corpora[2:], [], SEED).check_one_batch(16)
