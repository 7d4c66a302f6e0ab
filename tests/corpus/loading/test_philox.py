"""Philox against the test vectors of its authors, and as a source of even numbers."""

import numpy as np
import pytest
from scipy import stats

from dga_scale.corpus.loading.philox import below, philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key: tuple, counter: tuple, expected: tuple) -> None:
    assert tuple(philox4x32(key[0] | key[1] << 32, *counter).tolist()) == expected


def test_arrays_give_what_each_counter_gives_alone() -> None:
    c0, c1 = np.arange(5)[:, None], np.arange(3)[None, :]
    together = philox4x32(7, c0, c1, 2, 9)
    assert together.shape == (5, 3, 4)
    for i in range(5):
        for j in range(3):
            assert np.array_equal(together[i, j], philox4x32(7, i, j, 2, 9))


def test_below_is_even() -> None:
    draws = below(philox4x32(1, np.arange(25_000), 0, 0, 0).ravel(), 10)
    assert draws.min() == 0
    assert draws.max() == 9
    assert stats.chisquare(np.bincount(draws)).pvalue > 1e-3
