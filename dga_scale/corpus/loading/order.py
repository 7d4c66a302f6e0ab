"""The order of a corpus's rows: a permutation for each epoch, with no ranks in it."""

import math

import numpy as np

from dga_scale.corpus.loading.philox import below, philox4x32

_ROUNDS = 12
_ORDER_STREAM = 0xFFFFFFFF
"""The last counter word of the order's draws, which no masking draw uses."""


class SampleOrder:
    """The endless sequence of rows a run trains on.

    Position p of the sequence lies in epoch e = p // num_samples; within an epoch every row comes once, in an
    order that (seed, e) decides. Any stretch is computed on its own, from its positions: no list of the
    corpus's size is kept, and a resumed run needs one number.

    The permutation is a Feistel network over pairs below the square root of ``num_samples``, walked until the
    result is a row (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), with Philox as its
    round function.

    Example::

        order = SampleOrder(len(corpus), seed=42)
        rows = order.indices(step * 256, (step + 1) * 256)
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples > 0, num_samples
        self.num_samples = num_samples
        self.seed = seed
        self._side = math.isqrt(num_samples - 1) + 1  # side**2 >= num_samples, barely

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the rows at positions ``start`` to ``stop``: (stop - start,) int64."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, rows = np.divmod(positions, self.num_samples)
        rows = self._permute(rows, epochs)
        while len(outside := np.flatnonzero(rows >= self.num_samples)):
            rows[outside] = self._permute(rows[outside], epochs[outside])
        return rows

    def epochs(self, start: int, stop: int) -> np.ndarray:
        """Return the epoch of each position: (stop - start,) int64."""
        return np.arange(start, stop, dtype=np.int64) // self.num_samples

    def _permute(self, values: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Apply a bijection of [0, side**2), for each epoch another."""
        left, right = np.divmod(values, self._side)
        for number in range(_ROUNDS):
            words = philox4x32(self.seed, right, epochs, number, _ORDER_STREAM)[..., 0]
            left, right = right, (left + below(words, self._side)) % self._side
        return left * self._side + right
