"""A contrast over all micro-steps of a global batch, at the memory of one (GradCache, arXiv 2101.06983).

The loss depends on an example through its pooled states alone. So all micro-batches have a forward pass
without gradient first, the loss and its gradient with respect to the states are computed, and each
micro-batch then has a second forward pass with gradient, where its loss holds the inner product of states and
those
gradients: it has the gradient of the whole contrast.
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
    """One micro-batch's part of the contrast, which its second forward pass needs.

    Attributes:
        loss: The loss of this rank's anchors of all micro-steps, detached. Its mean over ranks is the
            contrast's value on the global batch.
        gradients: The gradients with respect to the states (B, H), by side, of the sum of all ranks' losses,
            times the micro-steps, as DeepSpeed takes the mean over both.
        cpu_state, cuda_state: The states of the random generators at the first forward pass's dropout draws.

    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    cpu_state: Tensor
    cuda_state: Tensor | None

    def term(self, states: Sequence[Tensor]) -> Tensor:
        """Return the contrast's value, with its gradient through these states (B, H) by side."""
        products = [(state * gradient).sum() for state, gradient in zip(states, self.gradients, strict=True)]
        inner = torch.stack(products).sum()
        return self.loss + (inner - inner.detach())

    @contextmanager
    def repeated_draws(self) -> Iterator[None]:
        """Repeat the first forward pass's draws inside; draws afterwards are as if there had been none."""
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
    """Compute a contrast over a global batch: one gather over ranks, whatever the number of micro-steps.

    Args:
        contrast: The contrast.
        micro_batches: This rank's part of the global batch; as many, and as large, on every rank.
        pooled: A function that returns a micro-batch's states (B, H), by side, with dropout draws as in the
            forward pass with gradient.

    Returns:
        The part of each micro-batch, for its forward pass with gradient.

    """
    draws, states = [], []
    with torch.no_grad():
        for inputs in micro_batches:
            device = inputs.input_ids.device
            cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            draws.append((torch.get_rng_state(), cuda_state))
            states.append(pooled(inputs))
    sides = [torch.cat(of_side).requires_grad_() for of_side in zip(*states, strict=True)]  # (steps * B, H)
    loss = contrast.loss(sides)
    gradients = torch.autograd.grad(loss * len(micro_batches), sides)
    parts = zip(*(gradient.chunk(len(micro_batches)) for gradient in gradients), strict=True)
    return [CachedContrast(loss.detach(), part, *drawn) for part, drawn in zip(parts, draws, strict=True)]
