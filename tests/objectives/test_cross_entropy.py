"""Cross-entropies against torch's own in fp64, in values, gradients and what the backward pass keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dga_scale.objectives.cross_entropy import cross_entropies
from tests.helpers.engines import saved_bytes

KINDS = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 90_001
"""Entries of a vocabulary of which a group of rows holds two, in tests' one thread."""


def drawn(rows: int, vocabulary: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of several sizes, one of them sure of its label, and labels of which some don't count."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    spread = torch.linspace(0.1, 8, rows)[:, None]
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    logits[0, labels[0]] = 12.0
    labels[2::4] = -100
    return logits.to(kind).requires_grad_(), labels


def expected(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient in fp64."""
    exact = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses @ weights.double(), exact)
    return losses.detach(), gradient


def gradient_of(logits: Tensor) -> Tensor:
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 7), (9, LARGE)])
def test_as_in_double_precision(kind: torch.dtype, shape: tuple[int, int]) -> None:
    """The gradient differs by one rounding to the logits' dtype."""
    logits, labels = drawn(*shape, kind)
    weights = torch.linspace(-1, 3, len(labels))
    losses = cross_entropies(logits, labels)
    (losses @ weights).backward()
    exact, gradient = expected(logits, labels, weights)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    found, rounding = gradient_of(logits), torch.finfo(kind).eps / 2
    assert found.dtype == kind
    torch.testing.assert_close(found.double(), gradient, rtol=rounding + 3e-5, atol=1e-7)
    assert not found[labels == -100].any()


def test_a_loss_scale_reaches_gradients_before_they_are_rounded() -> None:
    """A softmax of 1/250,000: coarse in fp16, and nothing times a weight of 1/3,000, without the scale."""
    logits = torch.zeros(2, 250_000, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([5, 6])
    weight, scale = 1 / 3000, 2.0**16
    (cross_entropies(logits, labels).sum() * weight * scale).backward()
    assert gradient_of(logits)[0, 0].item() == pytest.approx(scale * weight / 250_000, rel=1e-3)


def test_labels_that_do_not_count() -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    losses = cross_entropies(logits, torch.full((5,), -100))
    losses.sum().backward()
    assert losses.tolist() == [0] * 5
    assert not gradient_of(logits).any()


def test_no_positions() -> None:
    logits = torch.randn(0, 11, requires_grad=True)
    losses = cross_entropies(logits, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert gradient_of(logits).shape == (0, 11)


def test_gradients_in_fp64() -> None:
    logits, labels = drawn(6, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropies(x, labels), logits)


def test_other_readers_of_the_logits_keep_theirs() -> None:
    """The gradients add up, and the logits are what they were."""
    logits, labels = drawn(9, 50, torch.float32)
    before = logits.detach().clone()
    (cross_entropies(logits, labels).sum() + logits.square().sum()).backward()
    _, gradient = expected(before, labels, torch.ones(9))
    torch.testing.assert_close(
        gradient_of(logits).double(), gradient + 2 * before.double(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_logits_are_all_that_is_kept() -> None:
    """Beside a label and three figures a position: none in fp32 over the vocabulary."""
    logits, labels = drawn(8, 10_000, torch.bfloat16)
    head = torch.nn.Identity()
    _, size = saved_bytes(head, lambda: cross_entropies(logits, labels))
    assert 2 * logits.numel() <= size <= 2 * logits.numel() + 8 * 24
    with torch.no_grad():
        losses, size = saved_bytes(head, lambda: cross_entropies(logits, labels))
    assert size == 0
    assert not losses.requires_grad


def test_a_second_derivative_is_refused() -> None:
    logits, labels = drawn(3, 5, torch.float32)
    losses = cross_entropies(logits, labels)
    with pytest.raises(AssertionError, match="create_graph"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)
