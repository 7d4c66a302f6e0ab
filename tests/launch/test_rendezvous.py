"""Rendezvous of the ranks, and the messages where it fails."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from dga_scale.errors import UserError
from dga_scale.launch.environment import LaunchInfo
from dga_scale.launch.rendezvous import RankInfo, _contradiction, _find_problem, _missing, rendezvous
from tests.helpers.ranks import free_port

HERE = socket.gethostname()


def info(rank: int, world_size: int = 2, launcher: str = "mpirun") -> LaunchInfo:
    return LaunchInfo(launcher, rank, world_size, rank, world_size, None, 0)


def together(*infos: LaunchInfo, seconds: float = 20.0, gpus: tuple[str | None, ...] = ()) -> list[str]:
    """Return the message that each of several ranks (threads here) gets; "joined" where nothing is wrong."""
    port = free_port()
    held = []  # rank 0's thread may be the first to end: the store must not end with it

    def one(number: int) -> str:
        gpu = gpus[number] if gpus else None
        try:
            store = rendezvous(infos[number], "127.0.0.1", port, gpu, timedelta(seconds=seconds))
        except UserError as error:
            return str(error)
        held.append(store)
        store.set(f"done/{number}", "")
        store.wait([f"done/{other}" for other in range(len(infos))], timedelta(seconds=20))
        return "joined"

    with ThreadPoolExecutor(len(infos)) as pool:
        return list(pool.map(one, range(len(infos))))


def test_ranks_join() -> None:
    assert together(info(0), info(1)) == ["joined"] * 2
    assert together(info(0, 1)) == ["joined"]


def test_a_rank_that_never_comes_is_named_to_all() -> None:
    found = together(info(0, 4), info(2, 4), seconds=1.5)
    assert found[0] == found[1]
    assert found[0].startswith(
        f"2 of 4 ranks did not join within 1.5 s: 1, 3 missing, joined: 0 on {HERE}, 2 on"
    )


def test_a_rank_that_joined_counts_however_late_the_store_answers() -> None:
    """The missing ranks use up the timeout: no time is left to wait for the store's answer on rank 2."""

    class Slow(dist.HashStore):
        def wait(self, keys: list[str], timeout: timedelta) -> None:
            time.sleep(timeout.total_seconds())
            raise dist.DistStoreError("no answer in time")

    store = Slow()
    for rank in (0, 2):
        store.set(f"rank/{rank}", json.dumps(asdict(RankInfo("srun", 4, HERE, "10.0.0.1", None))))
    patience = timedelta(seconds=0.1)
    found = _find_problem(store, 4, _missing(store, 4, patience), patience)
    assert found.startswith("2 of 4 ranks did not join within 0.1 s: 1, 3 missing, joined: 0 on")


def test_a_long_wait_says_for_whom_and_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dga_scale.launch.rendezvous._SAYS_AFTER", timedelta(seconds=0.2))
    together(info(0, 4), info(2, 4), seconds=1.5)
    assert f"rank 0 on {HERE} waits for ranks 1, 3 of 4, to join at 127.0.0.1:" in capsys.readouterr().err
    stale = replace(info(1, 2), launcher="environment")
    with pytest.raises(UserError, match="can't reach rank 0"):
        rendezvous(stale, "127.0.0.1", free_port(), None, timedelta(seconds=1.5))
    said = capsys.readouterr().err
    assert f"rank 1 on {HERE} waits for rank 0 at 127.0.0.1:" in said
    assert "RANK and WORLD_SIZE come from the environment: unset them for a single process" in said


def test_rank_0_out_of_reach() -> None:
    (found,) = together(info(1), seconds=0.5)
    assert found.startswith(f"rank 1 on {HERE} can't reach rank 0 at 127.0.0.1:")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"rank 0 on {HERE} can't open port {port} .*another MASTER_PORT"
        ):
            rendezvous(info(0), "127.0.0.1", port, None, timedelta(seconds=1))


def test_ranks_that_count_otherwise() -> None:
    found = together(info(0), info(1, 3))
    assert found[0] == found[1]
    assert found[0].startswith(f"rank 1 on {HERE} counts 3 ranks, rank 0 on {HERE} 2: give every node")


def test_a_rank_that_comes_twice() -> None:
    found = together(info(0, 3), info(1, 3), info(1, 3), seconds=1.5)
    assert sum(f"two processes are rank 1, on {HERE} and on {HERE}" in text for text in found) == 1
    assert sum("1 of 3 ranks did not join" in text for text in found) == 2


def test_one_gpu_for_two_ranks() -> None:
    found = together(info(0), info(1), gpus=("GPU-1", "GPU-1"))
    assert found[0] == found[1]
    assert f"ranks 0 and 1 have the same GPU of {HERE}" in found[0]
    assert together(info(0), info(1), gpus=("GPU-1", "GPU-2")) == ["joined"] * 2


def test_ranks_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    first = RankInfo("srun", 2, "alpha", "10.0.0.1", None)
    second = replace(first, host="beta", own_address="10.0.0.2")
    assert _contradiction([first, second]) == ""
    assert "rank 1 on beta was started by mpirun, rank 0 on alpha by srun" in _contradiction(
        [first, replace(second, launcher="mpirun")]
    )
    assert "rank 1 on beta sees no GPU" in _contradiction([replace(first, gpu="GPU-1"), second])
    loop = replace(second, own_address="127.0.1.1")
    assert "beta resolves its own name to 127.0.1.1" in _contradiction([first, loop])
    assert _contradiction([replace(loop, host="alpha"), replace(loop, host="alpha")]) == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert _contradiction([first, loop]) == ""
