"""Intervals and tests against scipy, closed forms and a naive loop."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dga_scale.endtasks.significance import difference, interval, ratio, ratio_difference, sign_flip

VALUES = [0.61, 0.58, 0.66, 0.63, 0.60]
BASE = [0.55, 0.59, 0.60, 0.61, 0.52]


def test_interval_of_a_mean():
    found = interval(VALUES)
    reference = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(VALUES), rel=1e-14)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), rel=1e-12)
    assert found.count == 5
    # Two values: t(0.975, 1) = tan(0.475 pi), standard error |a - b| / 2.
    two = interval([1.0, 3.0])
    assert two.high == pytest.approx(2 + math.tan(0.475 * math.pi), rel=1e-9)  # scipy 1.14: to 2e-11


def test_paired_tests_against_scipy():
    found = difference(VALUES, BASE)
    reference = stats.ttest_rel(VALUES, BASE)
    bounds = reference.confidence_interval(0.95)
    assert found.p_t == pytest.approx(reference.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), rel=1e-12)
    flips = stats.permutation_test(
        (np.subtract(VALUES, BASE),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p_sign_flip == pytest.approx(flips.pvalue, rel=1e-12)


def test_sign_flips_against_a_loop():
    differences = [3.0, -1.0, 2.0, 2.0, -4.0, 0.5]
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert sign_flip(differences) == sum(value >= observed for value in sums) / 64


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_all_of_one_sign_is_as_sure_as_it_gets(count: int):
    assert sign_flip([0.1] * count) == 2 / 2**count
    assert sign_flip([0.1, -0.1] * (count // 2)) == 1.0


def test_sums_that_are_equal_but_for_rounding_count_as_equal():
    """0.3 - 0.9 + 0.6 + 0.1 - 0.2 = -0.1, the least there is: no assignment is nearer to 0."""
    assert sign_flip([0.3, -0.9, 0.6, 0.1, -0.2]) == 1.0


def test_what_has_no_answer():
    one = difference([0.5], [0.4])
    assert (one.mean, one.count) == (pytest.approx(0.1), 1)
    assert (one.low, one.high, one.p_t, one.p_sign_flip) == (None, None, None, None)
    assert sign_flip([1.0] * 17) is None
    same = difference([0.5, 0.6], [0.5, 0.6])
    assert (same.low, same.high, same.p_t, same.p_sign_flip) == (0.0, 0.0, 1.0, 1.0)
    assert difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]).p_t is None


def test_a_ratio_over_batches_of_one_size_is_their_mean():
    sums, base, counts = np.array(VALUES) * 40, np.array(BASE) * 40, [40.0] * 5
    assert vars(ratio(sums, counts)) == pytest.approx(vars(interval(VALUES)), rel=1e-9)
    found, reference = ratio_difference(sums, base, counts), difference(VALUES, BASE)
    for name in ("mean", "low", "high", "p_t"):
        assert getattr(found, name) == pytest.approx(getattr(reference, name), rel=1e-9), name


def test_the_interval_of_a_loss_does_not_go_below_0():
    few = ratio([1.0, 60.0], [20.0, 20.0])
    assert (few.mean, few.low) == (61 / 40, 0.0)
    assert few.high == pytest.approx(interval([1 / 20, 3.0]).high)
    assert ratio([-1.0, 2.0], [20.0, 20.0]).low < 0


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    """Batches of unequal sizes, 2000 times: the true mean is inside in about 95%."""
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        counts = draw.integers(20, 60, size=30).astype(float)
        found = ratio(counts * 2.0 + draw.normal(size=30) * np.sqrt(counts), counts)
        assert found.low is not None
        assert found.high is not None
        inside += found.low < 2.0 < found.high
    assert 0.93 < inside / 2000 < 0.97
