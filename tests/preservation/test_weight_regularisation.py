"""The weight penalty's value and gradient against autograd of the formula, on a plain model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import WeightPenalty, key_of

WEIGHT = 3.0


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def cut(model: nn.Module, pieces: int = 1) -> list[Fragment]:
    """Fragments of a model's parameters, each cut into about so many."""
    fragments = []
    for name, parameter in model.named_parameters():
        flat, shape = parameter.data.view(-1), tuple(parameter.shape)
        start = 0
        for part in flat.tensor_split(pieces):
            fragments.append(Fragment(name, start, shape, part))
            start += len(part)
    return fragments


def some_fisher(fragments: list[Fragment]) -> dict[tuple[str, int], Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {key_of(f): torch.rand(len(f.values), generator=generator) for f in fragments}


def move(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)


def same(value: Tensor) -> Tensor:
    return value


@pytest.mark.parametrize("ewc", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_penalty_and_gradient_are_those_of_the_formula(ewc: bool, pieces: int) -> None:
    model = plain_model()
    start = [p.detach().clone() for p in model.parameters()]
    fragments = cut(model, pieces)
    fisher = some_fisher(fragments) if ewc else None
    weight_penalty = WeightPenalty(fragments, WEIGHT, fisher)
    move(model)

    flat_start = torch.cat([p.flatten() for p in start])
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    f = torch.cat([fisher[key_of(x)] for x in fragments]) if fisher else torch.ones_like(flat)
    penalty = WEIGHT / 2 * (f * (flat - flat_start) ** 2).sum()
    (expected,) = torch.autograd.grad(penalty, flat)

    assert weight_penalty.penalty(fragments, same) == pytest.approx(penalty.item(), rel=1e-6)
    data = torch.randn(len(flat), generator=torch.Generator().manual_seed(2))
    gradients = list(data.clone().split([len(x.values) for x in fragments]))
    for fragment, gradient in zip(fragments, gradients, strict=True):
        weight_penalty.add_gradient(fragment, gradient)
    torch.testing.assert_close(torch.cat(gradients), data + expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ewc", [False, True])
def test_nothing_pulls_at_the_reference_weights(ewc: bool) -> None:
    model = plain_model()
    fragments = cut(model)
    weight_penalty = WeightPenalty(fragments, WEIGHT, some_fisher(fragments) if ewc else None)
    assert weight_penalty.penalty(fragments, same) == 0
    for fragment in fragments:
        gradient = torch.randn(len(fragment.values))
        before = gradient.clone()
        weight_penalty.add_gradient(fragment, gradient)
        assert torch.equal(gradient, before)


def test_the_reference_does_not_follow_the_weights_and_other_parameters_are_left_alone() -> None:
    model = plain_model()
    first, *others = cut(model)
    weight_penalty = WeightPenalty([first], WEIGHT)
    move(model)
    gradient = torch.zeros_like(first.values)
    weight_penalty.add_gradient(first, gradient)
    assert (gradient != 0).all()
    for unknown in others:
        gradient = torch.zeros_like(unknown.values)
        weight_penalty.add_gradient(unknown, gradient)
        assert (gradient == 0).all()
    assert weight_penalty.penalty([first, *others], same) == weight_penalty.penalty([first], same)


@pytest.mark.parametrize(("copies", "reduce"), [(1, same), (4, lambda value: 4 * value)])
def test_a_model_that_every_rank_holds_counts_once(copies: int, reduce: Callable[[Tensor], Tensor]) -> None:
    model = plain_model()
    fragments = cut(model)
    weight_penalty = WeightPenalty(fragments, WEIGHT, copies=copies)
    move(model)
    alone = WeightPenalty(cut(plain_model()), WEIGHT)
    assert weight_penalty.penalty(fragments, reduce) == pytest.approx(alone.penalty(fragments, same))


def test_bytes_are_those_of_the_ranks_own_fragments() -> None:
    fragments = cut(plain_model(), 2)[::2]
    entries = sum(len(f.values) for f in fragments)
    assert WeightPenalty(fragments, WEIGHT).bytes_per_rank() == 4 * entries
    assert WeightPenalty(fragments, WEIGHT, some_fisher(fragments)).bytes_per_rank() == 8 * entries
