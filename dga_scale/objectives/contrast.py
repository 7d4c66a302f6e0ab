"""Contrasts of a batch's examples against the keys of all ranks: DGA's, and plain InfoNCE."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.views import View, mean_pool


def pool_real_tokens(hidden: Tensor, inputs: Batch) -> Tensor:
    """Return the mean of hidden states (B, T, H) over each example's real tokens: (B, H) in fp32."""
    return mean_pool(hidden, inputs.attention_mask)


class Side(NamedTuple):
    """One side of a contrast: a view, and how its hidden states (B, T, H) are pooled to (B, H)."""

    view: View
    pool: Callable[[Tensor, Batch], Tensor] = pool_real_tokens


@dataclass(frozen=True)
class Contrast:
    """A contrast of examples, as a method describes it.

    Attributes:
        name: The name under which the contrast is logged.
        weight: The weight of the contrast in the loss.
        temperature: The temperature tau of ``contrastive_loss``.
        scope: The examples that are contrasted; see ``ContrastSettings.contrast_scope``.
        sides: The anchors, the positives and, where there is a third side, further negatives.

    """

    name: str
    weight: float
    temperature: float
    scope: str
    sides: Sequence[Side]

    @property
    def views(self) -> tuple[View, ...]:
        """The views that are pooled."""
        return tuple(side.view for side in self.sides)

    @property
    def gathered(self) -> int:
        """The number of states of each example that go to all ranks: all but the anchors'."""
        return len(self.sides) - 1

    def spans(self, micro_steps: int) -> bool:
        """Return whether the contrast goes over several micro-steps."""
        return self.scope == "global_batch" and micro_steps > 1

    def pooled(self, hidden: Mapping[str, Tensor], inputs: Batch) -> tuple[Tensor, ...]:
        """Pool hidden states (B, T, H), given by name of view: (B, H) fp32 for each side."""
        return tuple(side.pool(hidden[side.view.name], inputs) for side in self.sides)

    def loss(self, states: Sequence[Tensor]) -> Tensor:
        """Compute ``contrastive_loss`` of the sides' states (B, H)."""
        u, v, *w = states
        return contrastive_loss(u, v, w[0] if w else None, self.temperature)


def contrastive_loss(u: Tensor, v: Tensor, w: Tensor | None, temperature: float) -> Tensor:
    """Compute InfoNCE of this rank's anchors against every rank's keys (DGA, eq. of L_contrast).

        -1/B sum_i log e^{s(u_i, v_i)/tau} / ( sum_j e^{s(u_i, v_j)/tau} + sum_j e^{s(u_i, w_j)/tau} )

    Without ``w`` the second sum is left out, and this is the InfoNCE of SimCSE.

    i runs over the rank's own examples, j over those of all ranks, s is the cosine. Averaged over ranks, as
    DeepSpeed averages gradients, loss and gradient are those of one process that holds the whole batch: the
    keys are gathered with their gradients.

    Args:
        u, v: (B, H) pooled states, row by row the positive pairs. B is the same on every rank.
        w: (B, H) further negatives: DGA's pooled states of the gated view.
        temperature: The temperature tau.

    Returns:
        The loss, a scalar in fp32.

    """
    logits, targets = contrastive_logits(u, v, w, temperature)
    return F.cross_entropy(logits, targets)


def contrastive_logits(u: Tensor, v: Tensor, w: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Return anchors' similarities to all keys (B, sides * ranks * B), and the positives' columns (B,)."""
    anchors = F.normalize(u.float(), dim=-1)
    sides = [v] if w is None else [v, w]
    keys, rank = torch.stack([F.normalize(side.float(), dim=-1) for side in sides]), 0  # (sides, B, H)
    if dist.is_initialized() and dist.get_world_size() > 1:
        keys, rank = torch.cat(dist_nn.all_gather(keys), dim=1), dist.get_rank()  # (sides, ranks * B, H)
    logits = anchors @ keys.flatten(0, 1).T / temperature
    return logits, rank * len(u) + torch.arange(len(u), device=u.device)
