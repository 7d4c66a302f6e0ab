"""Contrasts of a batch's examples against the keys of all ranks: DGA's, and plain InfoNCE."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(u: Tensor, v: Tensor, w: Tensor | None, temperature: float) -> Tensor:
    """InfoNCE of this rank's anchors against every rank's keys (DGA, eq. of L_contrast).

        -1/B sum_i log e^{s(u_i, v_i)/tau} / ( sum_j e^{s(u_i, v_j)/tau} + sum_j e^{s(u_i, w_j)/tau} )

    Without ``w`` the second sum is left out, and this is the InfoNCE of SimCSE.

    i runs over the rank's own examples, j over those of all ranks (one micro-step of each), s is the
    cosine. Averaged over ranks, as DeepSpeed averages gradients, loss and gradient are those of one process
    that holds the whole batch: the keys are gathered with their gradients.

    Args:
        u, v: (B, H) pooled states, row by row the positive pairs. B is the same on every rank.
        w: (B, H) further negatives: DGA's pooled states of the gated reading.
        temperature: tau.

    Returns:
        scalar, fp32.

    """
    logits, targets = contrastive_logits(u, v, w, temperature)
    return F.cross_entropy(logits, targets)


def contrastive_logits(u: Tensor, v: Tensor, w: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Similarities of own anchors to all keys (B, sides * ranks * B), and the column (B,) of positives."""
    anchors = F.normalize(u.float(), dim=-1)
    sides = [v] if w is None else [v, w]
    keys, rank = torch.stack([F.normalize(side.float(), dim=-1) for side in sides]), 0  # (sides, B, H)
    if dist.is_initialized() and dist.get_world_size() > 1:
        keys, rank = torch.cat(dist_nn.all_gather(keys), dim=1), dist.get_rank()  # (sides, ranks * B, H)
    logits = anchors @ keys.flatten(0, 1).T / temperature
    return logits, rank * len(u) + torch.arange(len(u), device=u.device)
