"""DGA's contrast between full and general knowledge, against the keys of all ranks."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(u: Tensor, v: Tensor, w: Tensor, temperature: float) -> Tensor:
    """InfoNCE of this rank's anchors against every rank's keys (DGA, eq. of L_contrast).

        -1/B sum_i log e^{s(u_i, v_i)/tau} / ( sum_j e^{s(u_i, v_j)/tau} + sum_j e^{s(u_i, w_j)/tau} )

    i runs over the rank's own examples, j over those of all ranks (one micro-step of each), s is the
    cosine. Averaged over ranks, as DeepSpeed averages gradients, loss and gradient are those of one process
    that holds the whole batch: the keys are gathered with their gradients.

    Args:
        u, v: (B, H) pooled states of two ungated readings, the positive pair. B is the same on every rank.
        w: (B, H) pooled states of the gated reading, negatives.
        temperature: tau.

    Returns:
        scalar, fp32.

    """
    logits, targets = contrastive_logits(u, v, w, temperature)
    return F.cross_entropy(logits, targets)


def contrastive_logits(u: Tensor, v: Tensor, w: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Similarities of own anchors to all keys (B, 2 * ranks * B), and the column (B,) of each positive."""
    anchors, positives, negatives = (F.normalize(states.float(), dim=-1) for states in (u, v, w))
    keys, rank = torch.stack([positives, negatives]), 0  # (2, B, H)
    if dist.is_initialized() and dist.get_world_size() > 1:
        keys, rank = torch.cat(dist_nn.all_gather(keys), dim=1), dist.get_rank()  # (2, ranks * B, H)
    logits = anchors @ keys.flatten(0, 1).T / temperature
    return logits, rank * len(u) + torch.arange(len(u), device=u.device)
