"""The order of samples: a permutation an epoch, the same however it is cut."""

import numpy as np
import pytest
from scipy import stats

from dga_scale.corpus.loading.order import SampleOrder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 100, 101, 1000, 4096, 4097])
def test_each_epoch_holds_every_row_once(size: int) -> None:
    order = SampleOrder(size, seed=3)
    for epoch in range(3):
        rows = order.indices(epoch * size, (epoch + 1) * size)
        assert np.array_equal(np.sort(rows), np.arange(size))
    assert order.epochs(size - 1, size + 1).tolist() == [0, 1]


def test_any_stretch_is_part_of_one_sequence() -> None:
    order = SampleOrder(1000, seed=1)
    whole = order.indices(0, 3000)
    generator = np.random.default_rng(0)
    for start in generator.integers(0, 2900, 30):
        stop = start + generator.integers(1, 100)
        assert np.array_equal(order.indices(start, stop), whole[start:stop])


def test_epochs_and_seeds_differ() -> None:
    size = 1000
    sequences = [SampleOrder(size, seed).indices(e * size, (e + 1) * size) for seed in (0, 1) for e in (0, 1)]
    for i, first in enumerate(sequences):
        for second in sequences[:i]:
            assert (first == second).mean() < 0.01
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_every_row_is_as_likely_at_every_place() -> None:
    size, trials = 11, 4000
    epochs = SampleOrder(size, seed=1).indices(0, size * trials).reshape(trials, size)
    counts = np.stack([np.bincount(epochs[:, place], minlength=size) for place in range(size)])
    # Rows and columns sum to `trials`: (size - 1)**2 degrees of freedom.
    statistic = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert 1e-3 < stats.chi2.sf(statistic, (size - 1) ** 2) < 1 - 1e-3


def test_neighbours_do_not_stay_together() -> None:
    rows = SampleOrder(20_000, seed=5).indices(0, 20_000)
    steps = np.abs(np.diff(rows))
    # Two different places drawn at random are neighbours with probability 2 / size.
    assert (steps == 1).sum() <= stats.poisson.ppf(1 - 1e-4, 2)
    assert stats.kstest(rows[:2000] / 20_000, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03


def test_a_huge_corpus_costs_no_memory() -> None:
    order = SampleOrder(10**12 + 7, seed=1)
    rows = order.indices(10**11, 10**11 + 1000)
    assert len(np.unique(rows)) == 1000
    assert rows.min() >= 0
    assert rows.max() < 10**12 + 7
    assert rows.max() > 9 * 10**11
