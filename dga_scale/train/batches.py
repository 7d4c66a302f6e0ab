"""Batches on the device, and the seeds of what is drawn there."""

from typing import Any

import numpy as np
import torch

from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.views import ModelInputs

WARMUP_STREAM, IMPORTANCE_STREAM, PREPARE_STREAM, INITIAL_STREAM = 1, 2, 3, 4
"""Beside the training steps (0), what else draws random numbers from the run's seed."""


def to_device(batch: Batch, device: torch.device) -> ModelInputs:
    """The tensors of a batch that the model reads, on its device; on CUDA copied without waiting."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

    return ModelInputs._make(moved(getattr(batch, name)) for name in ModelInputs._fields)


def seed_of(seed: int, stream: int, step: int, rank: int) -> int:
    """Derive the seed of dropout of one step on one rank: a resumed run needs no saved random state."""
    return int(np.random.SeedSequence((seed, stream, step, rank)).generate_state(1, np.uint64)[0])


def seed_everything(seed: int, stream: int, step: int, rank: int) -> None:
    """Seed what is drawn from here on."""
    torch.manual_seed(seed_of(seed, stream, step, rank))
