"""Merging formulas against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from dga_scale.errors import UserError
from dga_scale.merging.formulas import linear, merge_tensors, slerp, ties
from dga_scale.merging.settings import MergeSettings


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_linear_goes_from_the_base_to_the_mean_of_the_models():
    base, one, two = drawn(5, 7), drawn(5, 7), drawn(5, 7)
    assert torch.equal(linear(base, [one], 0.0), base)
    assert torch.equal(linear(base, [one], 1.0), one)
    expected = 0.7 * base.double() + 0.3 * (one.double() + two.double()) / 2
    torch.testing.assert_close(linear(base, [one, two], 0.3).double(), expected, rtol=0, atol=1e-6)


def test_slerp_keeps_the_length_and_turns_by_a_share_of_the_angle():
    """In a plane it is known where a vector turned by a share of the angle ends."""
    angle = 1.1
    base = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    model = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)], [0.0, 0.0]])
    for weight in (0.0, 0.25, 0.5, 1.0):
        turned = torch.tensor([[2 * math.cos(weight * angle), 2 * math.sin(weight * angle)], [0.0, 0.0]])
        torch.testing.assert_close(slerp(base, model, weight), turned, rtol=0, atol=1e-6)


def test_slerp_ends_are_the_tensors_whatever_their_lengths():
    base, model = drawn(40), 3 * drawn(40)
    torch.testing.assert_close(slerp(base, model, 0.0), base, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slerp(base, model, 1.0), model, rtol=1e-6, atol=1e-7)


def test_slerp_of_nearly_parallel_tensors_is_the_straight_line():
    """Two checkpoints of a short training: the angle is small, and the arc cosine would be 0 or noise."""
    base = drawn(1000)
    model = base + 1e-6 * drawn(1000)
    expected = torch.lerp(base.double(), model.double(), 0.3)
    assert float((slerp(base, model, 0.3).double() - expected).norm() / (model - base).double().norm()) < 0.2
    for degenerate in (torch.zeros(1000), 2 * base, -base):
        merged = slerp(base, degenerate, 0.5)
        torch.testing.assert_close(merged, (base + degenerate) / 2, rtol=1e-6, atol=1e-6)


def naive_ties(base: np.ndarray, models: list[np.ndarray], weight: float, density: float) -> np.ndarray:
    """The paper's three steps, entry by entry."""
    kept = []
    for model in models:
        vector = (model - base).ravel()
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        largest = set(order[: max(1, round(density * len(vector)))])
        kept.append([value if i in largest else 0.0 for i, value in enumerate(vector)])
    merged = []
    for values, start in zip(zip(*kept, strict=True), base.ravel(), strict=True):
        positive = sum(v for v in values if v > 0) > -sum(v for v in values if v < 0)
        agreeing = [v for v in values if (v > 0 if positive else v < 0)]
        merged.append(start + weight * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return np.array(merged).reshape(base.shape)


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize(("weight", "density"), [(1.0, 0.2), (0.4, 0.5), (1.7, 1.0), (1.0, 0.001)])
def test_ties_is_trim_elect_and_disjoint_mean(models: int, weight: float, density: float):
    base = drawn(6, 9)
    adapted = [base + 0.1 * drawn(6, 9) for _ in range(models)]
    arrays = [t.double().numpy() for t in (base, *adapted)]
    expected = naive_ties(arrays[0], arrays[1:], weight, density)
    np.testing.assert_allclose(ties(base, adapted, weight, density).numpy(), expected, rtol=0, atol=2e-6)


def test_ties_of_opposite_updates_is_the_base():
    base, step = drawn(10), drawn(10)
    assert torch.equal(ties(base, [base.clone(), base.clone()], 1.0, 0.5), base)
    merged = ties(torch.zeros(10), [step, -step], 1.0, 1.0)
    assert torch.equal(merged, torch.zeros(10))


def test_arithmetic_is_in_fp32():
    base, model = drawn(64).bfloat16(), drawn(64).bfloat16()
    merged = merge_tensors(base, [model], MergeSettings("linear", 0.3))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, 0.7 * base.float() + 0.3 * model.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.2}, r"--weight 1.2 with --method linear: must be from 0 \(the base\) to 1"),
        ({"weight": -0.1, "method": "ties"}, "--weight -0.1 with --method ties: must be 0 or more"),
        ({"weight": math.nan}, "--weight nan"),
        ({"density": 0.0}, "--density 0: must be above 0"),
        ({"method": "dare"}, "--method dare: must be one of linear, slerp, ties"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        MergeSettings(**settings)
