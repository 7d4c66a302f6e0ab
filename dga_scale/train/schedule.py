"""The learning rate of a step: a function of the step alone, so that resuming needs no state."""

import math

from dga_scale.config.settings import OptimizationSettings


def learning_rate_at(step: int, settings: OptimizationSettings) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``settings.max_steps``.

    Rises linearly from ``peak / warmup`` to the peak over the first ``round(warmup_ratio * max_steps)``
    steps, so that no step is spent at a learning rate of 0, then decays so that it would reach
    ``min_lr_ratio * peak`` at step ``max_steps``, one past the last: the last step still learns.
    ``warmup_stable_decay`` decays as 1 - sqrt over the last ``decay_ratio`` of the steps (Haegele et al.,
    arXiv 2405.18392).

    Raises:
        ValueError: ``step`` outside the run.
    """
    total = settings.max_steps
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside a run of {total} steps")
    peak, floor = settings.learning_rate, settings.min_lr_ratio
    warmup = round(settings.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler_type == "linear":
        factor = 1 - progress
    elif settings.lr_scheduler_type == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.lr_scheduler_type == "constant":
        return peak
    else:
        decay = round(settings.decay_ratio * total)
        into_decay = step - (total - decay)
        factor = 1 - math.sqrt(into_decay / decay) if into_decay > 0 else 1.0
    return peak * (floor + (1 - floor) * factor)
