"""Cross-entropy of an LM head's logits, computed in fp32 a few rows at a time and kept in their own dtype.

``F.cross_entropy(logits.float(), ...)`` holds three fp32 tensors over positions and vocabulary: the copy, its
log-softmax until the backward pass, and the gradient. Here the backward pass takes the softmax anew from the
logits, so that beside those and their gradient nothing of that size exists.
"""

from typing import Any

import torch
from torch import Tensor

from dga_scale.corpus.loading.masking import IGNORED


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        skipped = (labels == IGNORED).unsqueeze(1)  # (N, 1)
        targets = labels.unsqueeze(1).masked_fill(skipped, 0)
        log_likelihoods = logits.new_empty(targets.shape, dtype=dtype)
        for rows in _groups(logits):
            log_softmax = logits[rows].log_softmax(dim=1, dtype=dtype)
            log_likelihoods[rows] = log_softmax.gather(1, targets[rows])
        ctx.save_for_backward(logits, targets, skipped, log_likelihoods)
        return -log_likelihoods.masked_fill(skipped, 0).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "this gradient can't be differentiated again (create_graph)"
        logits, targets, skipped, log_likelihoods = ctx.saved_tensors
        weights = gradients[0].unsqueeze(1).masked_fill(skipped, 0)  # (N, 1)
        at_targets = log_likelihoods.expm1()  # softmax - 1, where the label is
        found = torch.empty_like(logits)
        for rows in _groups(logits):
            softmax = logits[rows].softmax(dim=1, dtype=weights.dtype)
            softmax.scatter_(1, targets[rows], at_targets[rows])
            # Rounded only now, when the scale of an fp16 loss is in it: before, most would be 0.
            found[rows] = softmax.mul_(weights[rows])
        return found, None


def _groups(logits: Tensor) -> list[slice]:
    """Return the groups of rows of logits (N, V) that are computed at once.

    On one core a group is as large as its cache holds. On several cores, which wait for one another at each
    operation, and on a GPU, which launches each, it has 64 MiB of fp32, so that operations are few.
    """
    one_core = logits.device.type == "cpu" and torch.get_num_threads() == 1
    entries = 1 << 18 if one_core else 1 << 24
    rows, vocabulary = logits.shape
    step = max(1, entries // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute cross-entropies as ``F.cross_entropy(logits.float(), labels, reduction="none")`` gives them.

    Its gradient can't be differentiated again.

    Args:
        logits: (N, V), of any floating dtype; kept as they are until the backward pass.
        labels: (N,) in [0, V), or -100 at positions that don't count.

    Returns:
        (N,) fp32, or fp64 where logits are; 0 at positions that don't count.

    """
    losses: Tensor = _CrossEntropies.apply(logits, labels)
    return losses
