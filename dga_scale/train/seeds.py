"""The seeds of random draws on the devices."""

import numpy as np
import torch

WARMUP_STREAM, IMPORTANCE_STREAM, PREPARE_STREAM, INITIAL_STREAM = 1, 2, 3, 4
"""Beside the training steps (0), what else draws random numbers from the run's seed."""


def seed_of(seed: int, stream: int, step: int, rank: int) -> int:
    """Derive the seed of dropout of one step on one rank: a resumed run needs no saved random state."""
    return int(np.random.SeedSequence((seed, stream, step, rank)).generate_state(1, np.uint64)[0])


def seed_everything(seed: int, stream: int, step: int, rank: int) -> None:
    """Seed all draws from here on."""
    torch.manual_seed(seed_of(seed, stream, step, rank))
