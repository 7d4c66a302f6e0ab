"""A contrast over all micro-steps of a global batch, at the memory of one (GradCache, arXiv 2101.06983).

The loss depends on an example through its pooled states alone. So all micro-batches are read without gradient
first, the loss and its gradient with respect to the states are worked out, and each micro-batch is then read
again with gradient, where its loss holds the inner product of states and those gradients: it has the gradient
of the whole contrast.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.contrast import Contrast


@dataclass(frozen=True)
class CachedContrast:
    """What the second reading of a micro-batch needs to know of the first.

    Attributes:
        loss: of this rank's anchors of all micro-steps; detached. Its mean over ranks is the contrast's value
            on the global batch.
        gradients: of the states (B, H), by side: of the sum of all ranks' losses, times the micro-steps, as
            DeepSpeed takes the mean over both.
        cpu_state, cuda_state: of the random generators, where the first reading drew its dropout from.

    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    cpu_state: Tensor
    cuda_state: Tensor | None

    def term(self, states: Sequence[Tensor]) -> Tensor:
        """The contrast's value, with the gradient that reaches it through these states (B, H) by side."""
        products = [(state * gradient).sum() for state, gradient in zip(states, self.gradients, strict=True)]
        inner = torch.stack(products).sum()
        return self.loss + (inner - inner.detach())

    @contextmanager
    def repeated_draws(self) -> Iterator[None]:
        """Draw inside what the first reading drew; what is drawn afterwards is as if nothing had been."""
        devices = [self.loss.device] if self.cuda_state is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.cpu_state)
            if self.cuda_state is not None:
                torch.cuda.set_rng_state(self.cuda_state, self.loss.device)
            yield


def cache_contrast(
    contrast: Contrast,
    micro_batches: Sequence[Batch],
    pooled: Callable[[Batch], tuple[Tensor, ...]],
) -> list[CachedContrast]:
    """Read a global batch for the first time: one gather over ranks, whatever the number of micro-steps.

    Args:
        contrast: what is contrasted.
        micro_batches: this rank's part of the global batch; as many, and as large, on every rank.
        pooled: states (B, H) of a micro-batch, by side, as the reading with gradient will draw them.

    Returns:
        what each micro-batch's reading with gradient needs.

    """
    draws, read = [], []
    with torch.no_grad():
        for inputs in micro_batches:
            device = inputs.input_ids.device
            cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            draws.append((torch.get_rng_state(), cuda_state))
            read.append(pooled(inputs))
    sides = [torch.cat(of_side).requires_grad_() for of_side in zip(*read, strict=True)]  # (steps * B, H)
    loss = contrast.loss(sides)
    gradients = torch.autograd.grad(loss * len(micro_batches), sides)
    parts = zip(*(gradient.chunk(len(micro_batches)) for gradient in gradients), strict=True)
    return [CachedContrast(loss.detach(), part, *drawn) for part, drawn in zip(parts, draws, strict=True)]
