"""The helper that runs functions on several ranks: results, errors, hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _fail_on(rank: int, wait: bool) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"no good on {rank}")
    if wait:
        dist.barrier()
    return os.getpid()


def _hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.05)


def _die() -> None:
    os._exit(7)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_answers_in_order(world_size: int) -> None:
    total = sum(range(world_size)) + 10.0 * world_size
    assert run_ranks(world_size, _sum_of_ranks, 10) == [(rank, total) for rank in range(world_size)]


def test_an_error_names_its_rank_and_the_pool_survives() -> None:
    before = run_ranks(2, os.getpid)
    with pytest.raises(RankError, match=r"rank 1 raised in .*_fail_on: ValueError: no good on 1") as caught:
        run_ranks(2, _fail_on, 1, False)
    assert caught.value.errors == {1: ("ValueError", "no good on 1")}
    assert run_ranks(2, os.getpid) == before


def test_ranks_waiting_for_a_failed_one_are_replaced() -> None:
    before = run_ranks(2, os.getpid)
    with pytest.raises(RankError, match="rank 1 was left waiting") as caught:
        run_ranks(2, _fail_on, 0, True)
    assert set(caught.value.errors) == {0}
    assert not set(run_ranks(2, os.getpid)) & set(before)


def test_a_hang_says_where_and_the_pool_is_replaced() -> None:
    with pytest.raises(
        RankError, match=r"rank 1 hung in .*_hang_on after 5 s, File .*test_ranks.py"
    ) as caught:
        run_ranks(2, _hang_on, 1, timeout=5)
    assert set(caught.value.errors) == {1}
    assert run_ranks(2, _sum_of_ranks, 0) == [(0, 1.0), (1, 1.0)]


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(1, _die)
