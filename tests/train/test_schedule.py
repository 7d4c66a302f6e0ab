"""Learning rate: against transformers' own schedules and closed forms; it ends at the last step."""

import math

import pytest
import torch
from transformers import get_scheduler

from dga_scale.config.settings import OptimizationSettings
from dga_scale.train.schedule import Schedule


def rates(**settings) -> list[float]:
    optimization = OptimizationSettings(learning_rate=2.0, **settings)
    schedule = Schedule.of(optimization)
    return [schedule.learning_rate(step) for step in range(optimization.max_steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_equals_transformers(kind: str):
    """transformers starts its warm-up at 0, ours one step further; from the end of it on they agree."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=10, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(max_steps=100, warmup_ratio=0.1, lr_scheduler_type=kind)
    assert ours[10:] == pytest.approx(expected[10:], abs=1e-12)
    assert ours[:9] == pytest.approx(expected[1:10], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("total", [1, 2, 7, 100, 2500])
def test_every_step_learns_and_the_schedule_ends_at_the_last(kind: str, total: int):
    """Fault 10 of the released code: half of the compute ran at a learning rate of 0."""
    values = rates(max_steps=total, lr_scheduler_type=kind)
    assert all(value > 0 for value in values)
    assert max(values) <= 2.0
    if total >= 100:
        assert values[-1] < 2.0 * 0.07  # the last decay step: 1/sqrt scale for 1 - sqrt, less for the others
        assert values[-1] == min(values[total // 5 :])


def test_warmup_stable_decay_is_flat_then_one_minus_sqrt():
    values = rates(max_steps=100, warmup_ratio=0.1, decay_ratio=0.2, lr_scheduler_type="warmup_stable_decay")
    assert values[10:81] == [2.0] * 71
    assert values[85] == pytest.approx(2.0 * (1 - math.sqrt(5 / 20)))


def test_floor_and_constant():
    assert rates(max_steps=50, min_lr_ratio=0.1)[-1] == pytest.approx(2.0 * (0.1 + 0.9 / 45))
    assert rates(max_steps=10, warmup_ratio=0.0, lr_scheduler_type="constant") == [2.0] * 10


def test_a_step_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="step 10 is outside"):
        Schedule.of(OptimizationSettings(max_steps=10)).learning_rate(10)
