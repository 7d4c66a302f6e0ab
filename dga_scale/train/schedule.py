"""The learning rate of a step: a function of the step alone, so that resuming needs no other state."""

import math
from dataclasses import dataclass
from typing import Annotated

from dga_scale.config.comparison import Difference
from dga_scale.config.declaration import AT_LEAST_0, SHARE, Rule
from dga_scale.config.settings import DECAYS, OptimizationSettings


@dataclass(frozen=True)
class Schedule:
    """The learning rates of the steps from ``first`` to below ``stop``. Plain data: a checkpoint keeps it.

    Attributes:
        kind: The form of the decay after warm-up, ``--lr_scheduler_type``.
        peak: The largest learning rate.
        floor: The learning rate at the end of the decay, over the peak.
        first: The step that it begins with; above 0 where a run resumed with another schedule.
        stop: The step after its last one, ``--max_steps``.
        warmup: The number of steps in which the learning rate rises.
        decay: The number of last steps in which ``warmup_stable_decay`` decays.

    """

    kind: Annotated[str, Rule(lambda kind: kind in DECAYS, f"one of {', '.join(DECAYS)}")]
    peak: Annotated[float, AT_LEAST_0]
    floor: Annotated[float, SHARE]
    first: int
    stop: int
    warmup: int
    decay: int

    @classmethod
    def of(cls, settings: OptimizationSettings, first: int = 0, warmup: int | None = None) -> "Schedule":
        """Return the schedule that settings ask for.

        Args:
            settings: The settings; their shares of warm-up and decay are of the steps from ``first`` on.
            first: The step that it begins with.
            warmup: The steps of warm-up, instead of those that ``warmup_ratio`` gives.

        """
        steps = settings.max_steps - first
        return cls(
            kind=settings.lr_scheduler_type,
            peak=settings.learning_rate,
            floor=settings.min_lr_ratio,
            first=first,
            stop=settings.max_steps,
            warmup=round(settings.warmup_ratio * steps) if warmup is None else warmup,
            decay=round(settings.decay_ratio * steps),
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step`` (0-based).

        Rises linearly from ``peak / warmup`` to the peak, so that no step is spent at a learning rate of 0,
        then decays so that it would reach ``floor * peak`` at step ``stop``, one past the last: the last step
        still learns. ``warmup_stable_decay`` decays as 1 - sqrt over the last ``decay`` steps (Haegele et
        al., arXiv 2405.18392).

        Raises:
            ValueError: The step is outside the schedule.

        """
        if not self.first <= step < self.stop:
            raise ValueError(f"step {step} is outside a schedule of steps {self.first} to {self.stop}")
        own, total = step - self.first, self.stop - self.first
        if own < self.warmup:
            return self.peak * (own + 1) / self.warmup
        progress = (own - self.warmup) / max(1, total - self.warmup)
        if self.kind == "linear":
            factor = 1 - progress
        elif self.kind == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.kind == "constant":
            return self.peak
        else:
            into_decay = own - (total - self.decay)
            factor = 1 - math.sqrt(into_decay / self.decay) if into_decay > 0 else 1.0
        return self.peak * (self.floor + (1 - self.floor) * factor)

    def extended(self, settings: OptimizationSettings, done: int) -> "Schedule | None":
        """Return the schedule of other settings, if the steps done have had its learning rates too.

        A run that resumes with it is, step for step, one that had it from the beginning. Its warm-up is that
        of this schedule, in steps. None for a decay that has begun: it was one to another last step.

        Args:
            settings: The settings of the run that resumes.
            done: The number of steps done.

        """
        other = Schedule.of(settings, self.first, self.warmup)
        alike = all(self.learning_rate(s) == other.learning_rate(s) for s in range(self.first, done))
        return other if alike else None

    def __str__(self) -> str:
        """Describe the schedule for the log."""
        begins = f"from step {self.first} on, " if self.first else ""
        warmup = f"warm-up over {self.warmup} steps to {self.peak:g}, then " if self.warmup else ""
        end = f"{self.floor * self.peak:g} at step {self.stop}"
        if self.kind == "constant":
            decay = f"{self.peak:g} up to step {self.stop}"
        elif self.kind == "warmup_stable_decay":
            decay = f"{self.peak:g}, and over the last {self.decay} steps down to {end}"
        else:
            decay = f"{self.kind} decay to {end}"
        return f"{begins}{warmup}{decay}"


def may_extend(difference: Difference) -> bool:
    """Return whether a run may resume in its folder in spite of a setting that decides its numbers.

    ``--max_steps`` may be another one. Whether the steps done are those of such a run too depends on the
    schedule and on how many were done, which is known once the checkpoint is (``Schedule.extended``).
    """
    return difference.name == "max_steps"
