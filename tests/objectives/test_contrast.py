"""The contrast of one process in closed form, and on 1, 2 and 4 ranks against one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.objectives.contrast import contrastive_logits, contrastive_loss
from tests.helpers.ranks import run_ranks

TEMPERATURE = 0.05


def states(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """u, v, w: (3, rows, 16)."""
    return torch.randn(3, rows, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of_the_paper(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The formula of docs/methods.md (DGA, eq. of L_contrast), sums and exponentials as written; fp64."""

    def s(a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a, b) / (a.norm() * b.norm())

    u, v, w = u.double(), v.double(), w.double()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(u)):
        positive = torch.exp(s(u[i], v[i]) / TEMPERATURE)
        full = sum(torch.exp(s(u[i], v[j]) / TEMPERATURE) for j in range(len(u)))
        general = sum(torch.exp(s(u[i], w[j]) / TEMPERATURE) for j in range(len(u)))
        total = total - torch.log(positive / (full + general))
    return total / len(u)


def test_loss_and_gradient_are_those_of_the_paper() -> None:
    ours, papers = states(6).requires_grad_(), states(6).requires_grad_()
    loss, expected = contrastive_loss(*ours, TEMPERATURE), loss_of_the_paper(*papers)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, papers.grad, rtol=1e-5, atol=1e-6)


def test_loss_of_alike_states_counts_all_keys() -> None:
    """All states equal: every key has the same similarity, so the loss is log(2 N)."""
    same = torch.ones(3, 5, 16)
    assert contrastive_loss(*same, TEMPERATURE).item() == pytest.approx(math.log(10), rel=1e-6)


def test_low_precision_states_are_compared_in_fp32() -> None:
    low = states(6, dtype=torch.bfloat16)
    loss = contrastive_loss(*low, TEMPERATURE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(*low.float(), TEMPERATURE), rtol=0, atol=0)


def rank_part(rows: int) -> tuple[float, Tensor, tuple[int, ...], list[int]]:
    """On each rank: its rows of the whole batch; loss, its own states' gradient, logits shape and targets."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = states(rows)[:, rank * rows // ranks : (rank + 1) * rows // ranks].clone().requires_grad_()
    logits, targets = contrastive_logits(*own, TEMPERATURE)
    loss = contrastive_loss(*own, TEMPERATURE)
    loss.backward()
    assert own.grad is not None
    # DeepSpeed averages gradients over ranks.
    return loss.item(), own.grad / ranks, tuple(logits.shape), targets.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_have_the_loss_and_gradient_of_one_process(ranks: int) -> None:
    rows = 8
    whole = states(rows).requires_grad_()
    loss = contrastive_loss(*whole, TEMPERATURE)  # one process: no other rank here
    loss.backward()

    parts = run_ranks(ranks, rank_part, rows)
    assert sum(part[0] for part in parts) / ranks == pytest.approx(loss.item(), rel=1e-6)
    gradient = torch.cat([part[1] for part in parts], dim=1)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-5, atol=1e-6)
    for rank, (_, _, shape, targets) in enumerate(parts):
        assert shape == (rows // ranks, 2 * rows)  # own anchors x all keys, never the full square
        assert targets == list(range(rank * rows // ranks, (rank + 1) * rows // ranks))
