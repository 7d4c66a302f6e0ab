"""Confidence of means and differences: t intervals, paired t-test, exact sign-flip test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
"""The confidence level of every interval."""

EXACT_UP_TO = 16
"""The largest number of pairs for which all 2**n assignments of signs are tried; more take the t-test."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float | None
    """The lower end; None, like ``high``, where there is only one value."""
    high: float | None
    count: int
    """The number of values."""


@dataclass(frozen=True)
class Difference(Interval):
    """A mean of differences of pairs, with the p values of the hypothesis that there is no difference."""

    p_t: float | None
    """The p value of a two-sided paired t-test; None for one pair, or for equal differences other than 0."""
    p_sign_flip: float | None
    """The p value of an exact permutation test, never below 2 / 2**count; None for 1 or over 16 pairs."""


def interval(values: Sequence[float]) -> Interval:
    """Compute the mean of values and its t interval."""
    mean, error = _mean_and_error(values)
    return _interval(mean, error, len(values))


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Compute the mean of ``values - base``, pair by pair, with both tests."""
    differences = np.subtract(values, base)
    mean, error = _mean_and_error(differences)
    found = _interval(mean, error, len(differences))
    return Difference(
        **vars(found), p_t=_p(mean, error, len(differences)), p_sign_flip=sign_flip(differences)
    )


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Compute a mean per token, sum(sums) / sum(counts), with its t interval over the batches.

    The error is the ratio estimator's, sqrt(B / (B - 1) sum (s - r n)^2) / sum n (Cochran, Sampling
    Techniques, 6.4); where all B batches have the same number of tokens, it is the error of their means. An
    interval of what is never negative ends at 0, below which t intervals of a few batches may go.
    """
    mean, error = _ratio_and_error(sums, counts)
    found = _interval(mean, error, len(sums))
    if found.low is None or min(sums) < 0:
        return found
    return replace(found, low=max(found.low, 0.0))


def ratio_difference(sums: Sequence[float], base: Sequence[float], counts: Sequence[float]) -> Difference:
    """Compute the difference of two means per token over the same batches, with a t-test over the batches."""
    mean, error = _ratio_and_error(np.subtract(sums, base), counts)
    return Difference(
        **vars(_interval(mean, error, len(sums))), p_t=_p(mean, error, len(sums)), p_sign_flip=None
    )


def sign_flip(differences: Sequence[float] | np.ndarray) -> float | None:
    """Compute the share of the assignments of signs under which the sum is as far from 0 as the observed one.

    Returns:
        The p value; None for one pair or more than ``EXACT_UP_TO``.
    """
    count = len(differences)
    if not 2 <= count <= EXACT_UP_TO:
        return None
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)  # (2^n, n) of -1 and 1
    sums = np.abs(signs @ np.asarray(differences, dtype=np.float64))
    # Sums that are equal on paper differ by rounding, and the observed one (row 0) must count.
    return float((sums >= sums[0] - 1e-9 * np.abs(differences).sum()).mean())


def _mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Compute mean and standard error; the error is NaN for one value."""
    if len(values) == 1:
        return float(values[0]), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _ratio_and_error(sums: Sequence[float] | np.ndarray, counts: Sequence[float]) -> tuple[float, float]:
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = s.sum() / n.sum()
    if len(s) == 1:
        return float(mean), math.nan
    return float(mean), float(np.sqrt(len(s) / (len(s) - 1) * np.square(s - mean * n).sum()) / n.sum())


def _interval(mean: float, error: float, count: int) -> Interval:
    if math.isnan(error):
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Interval(mean, mean - half, mean + half, count)


def _p(mean: float, error: float, count: int) -> float | None:
    if error <= 1e-12 * abs(mean):  # the same everywhere, up to rounding
        return 1.0 if mean == 0 else None
    return None if math.isnan(error) else float(2 * stats.t.sf(abs(mean) / error, count - 1))
