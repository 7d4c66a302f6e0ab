"""Formulas that merge tensors of a base model and of models adapted from it; all arithmetic is in fp32."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dga_scale.merging.settings import MergeSettings


def merge_tensors(base: Tensor, models: Sequence[Tensor], settings: MergeSettings) -> Tensor:
    """Merge one tensor of every model, all of one shape, into fp32; ``slerp`` takes exactly one model."""
    base, models = base.float(), [model.float() for model in models]
    if settings.method == "linear":
        return linear(base, models, settings.weight)
    if settings.method == "slerp":
        (model,) = models
        return slerp(base, model, settings.weight)
    return ties(base, models, settings.weight, settings.density)


def linear(base: Tensor, models: Sequence[Tensor], weight: float) -> Tensor:
    """Compute (1 - weight) base + weight mean(models); weights 0 and 1 give the inputs bit for bit."""
    mean = models[0] if len(models) == 1 else torch.stack(list(models)).mean(dim=0)
    return torch.lerp(base, mean, weight)


def slerp(base: Tensor, model: Tensor, weight: float) -> Tensor:
    """Interpolate spherically between two tensors taken as vectors (Shoemake, 1985).

        sin((1 - w) angle) / sin(angle) base + sin(w angle) / sin(angle) model

    The vectors are not normalised, so the ends are the two tensors. Where the vectors span no plane (a zero
    vector, parallel or opposite vectors), the interpolation is linear, the formula's limit for parallel ones.
    Models after a short training are nearly parallel: their SLERP differs little from ``linear``.
    """
    u, v = (t.flatten().double() for t in (base, model))
    length_u, length_v = u.norm(), v.norm()
    if length_u == 0 or length_v == 0:
        return torch.lerp(base, model, weight)
    u, v = u / length_u, v / length_v
    # Kahan's formula is exact for small angles too, where the arc cosine of the dot product loses digits.
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if math.sin(angle) < 1e-9:
        return torch.lerp(base, model, weight)
    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - weight, weight))
    return first * base + second * model


def ties(base: Tensor, models: Sequence[Tensor], weight: float, density: float) -> Tensor:
    """Merge by TIES (Yadav et al., arXiv 2306.01708): trim, elect signs, average the entries that agree.

    Of each task vector (model - base) the ``density`` share with the largest magnitudes is kept; each entry's
    sign is that of the sum of the kept entries; the result is base + weight * mean of the kept entries with
    that sign. The paper trims over a whole model, this trims within each tensor, to hold one in memory.
    """
    trimmed = torch.stack([_trim(model - base, density) for model in models])  # (models, ...)
    sign = trimmed.sum(dim=0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    total = torch.where(agrees, trimmed, 0.0).sum(dim=0)
    return base + weight * total / agrees.sum(dim=0).clamp(min=1)


def _trim(task_vector: Tensor, density: float) -> Tensor:
    """Keep the round(density * n) entries of largest magnitude, at least one, and set the others to 0."""
    flat = task_vector.flatten()
    keep = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, keep, flat[keep]).view_as(task_vector)
