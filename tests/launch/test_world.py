"""Collectives of the ranks, errors that all of them share, and where they meet."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from dga_scale.errors import EXIT_USER_ERROR, UserError, run_main
from dga_scale.launch.environment import LaunchInfo
from dga_scale.launch.world import Cluster, _rendezvous_address, join_cluster
from tests.helpers.forks import launch
from tests.helpers.ranks import REPOSITORY, RankError, free_port, run_ranks, without_gloo


def _gathered() -> tuple[list[int], float, str, float]:
    cluster = join_cluster()
    mine = torch.tensor([cluster.rank + 1.0])
    total = cluster.sum(mine)
    assert mine.item() == cluster.rank + 1.0
    word = cluster.broadcast_object(f"from {cluster.rank}")
    return cluster.all_gather_object(cluster.rank), total.item(), word, cluster.run_on_first(lambda: 7.0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_collectives(world_size: int) -> None:
    total = world_size * (world_size + 1) / 2
    assert run_ranks(world_size, _gathered) == [(list(range(world_size)), total, "from 0", 7.0)] * world_size


def _fail_on(ranks: tuple[int, ...], kind: type[Exception]) -> str:
    cluster: Cluster = join_cluster()

    def work() -> int:
        if cluster.rank in ranks:
            raise kind("no such file")
        return 1

    try:
        cluster.run_on_all(work)
    except UserError as error:
        return f"UserError {error}"
    return "fine"


def test_all_ranks_raise_the_same_user_error() -> None:
    assert run_ranks(2, _fail_on, (), UserError) == ["fine"] * 2
    assert (
        run_ranks(2, _fail_on, (1,), UserError)
        == [f"UserError rank 1 on {socket.gethostname()}: no such file"] * 2
    )
    assert run_ranks(2, _fail_on, (0, 1), UserError) == ["UserError no such file"] * 2


def test_a_fault_of_ours_stays_where_it_is_and_stops_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, _fail_on, (1,), ZeroDivisionError)
    assert caught.value.errors == {
        0: ("RankFailed", f"rank 1 on {socket.gethostname()} failed: ZeroDivisionError: no such file"),
        1: ("ZeroDivisionError", "no such file"),
    }


def test_rank_0_tells_where_it_is_through_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it does is tested on two hosts; here that what is in the way is named."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    info = LaunchInfo("mpirun", 1, 2, 0, 1, None, 0)
    with pytest.raises(UserError, match=r"mpirun started processes on several nodes.*set MASTER_ADDR"):
        _rendezvous_address(info)


@pytest.mark.mpi
def test_an_mpi4py_of_another_mpi_is_refused() -> None:
    pytest.importorskip("mpi4py")
    hydra = ["PMI_RANK=1", "PMI_SIZE=2", "MPI_LOCALRANKID=0", "MPI_LOCALNRANKS=1"]
    join = (
        "from dga_scale.launch.world import join_cluster; from dga_scale.errors import run_main;"
        "run_main(lambda: join_cluster() and None)"
    )
    failed = subprocess.run(
        ["env", *hydra, sys.executable, "-c", join],
        capture_output=True, text=True, timeout=280, cwd=REPOSITORY,
    )  # fmt: skip
    assert failed.returncode == EXIT_USER_ERROR, failed.stderr
    assert "mpiexec started 2 processes, but mpi4py counts 1" in failed.stderr
    assert "MASTER_ADDR" in failed.stderr


LEAVING = """
import torch, torch.distributed as dist
from dga_scale.errors import end_rank, run_main
from dga_scale.launch.world import join_cluster

def main():
    global engine  # as DeepSpeed's refers to its group
    with join_cluster() as cluster:
        engine = dist.group.WORLD
        dist.all_reduce(torch.ones(200_000), async_op=True)
        cluster.barrier()
    print("left", flush=True)
    return 3

run_main(main, end=end_rank)
"""


def test_a_rank_ends_with_its_code_while_threads_of_gloo_hold_tensors() -> None:
    """With the interpreter's own shutdown about every second of these ranks aborts."""
    for _ in range(2):
        port = free_port()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", LEAVING],
                cwd=REPOSITORY,
                env=os.environ
                | {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "4"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(4)
        ]
        for rank in ranks:
            said, _ = rank.communicate(timeout=300)
            assert (rank.returncode, without_gloo(said)) == (3, "left\n")


# --- what ranks print of a mistake -------------------------------------------------------------------------


def one_finds_a_mistake_for_all() -> None:
    def check() -> None:
        if os.environ["RANK"] == "1":
            raise UserError("no such\nfolder")

    def main() -> None:
        with join_cluster() as cluster:
            cluster.run_on_all(check)

    run_main(main, end=sys.exit)


def both_wait_for_a_third() -> None:
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = "3"
    run_main(lambda: join_cluster(timedelta(seconds=1)) and None)


def both_have_a_wrong_flag() -> None:
    from dga_scale.train import cli

    cli.end_rank = sys.exit  # type: ignore[assignment]
    sys.argv = ["dga_train.py", "--max_stepps", "3"]
    cli.train_command()


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (one_finds_a_mistake_for_all, f"error: rank 1 on {socket.gethostname()}: no such\\nfolder\n"),
        (both_wait_for_a_third, "error: 1 of 3 ranks did not join within 1 s: 2 missing"),
        (both_have_a_wrong_flag, "error: unknown setting --max_stepps"),
    ],
)
def test_a_mistake_that_is_everybodys_is_said_once(behave: Callable[[], None], said: str) -> None:
    launched = launch(2, behave)
    assert launched.wait() == [EXIT_USER_ERROR] * 2
    errors = [line for line in launched.output(0).splitlines(keepends=True) if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(said)
    assert "error" not in launched.output(1)
