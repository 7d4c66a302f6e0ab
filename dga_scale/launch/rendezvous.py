"""The ranks of a run find each other, and say what is wrong where they can't.

Before any process group is up they meet in a key-value store that rank 0 holds at the master address
(torchrun holds one itself). Rank 0 looks at who came, and all get its verdict.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from dga_scale.errors import UserError
from dga_scale.launch.environment import LaunchInfo

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long the ranks wait for the last of them to start, and then for their connections."""
_GOODBYE = timedelta(seconds=10)


@dataclass(frozen=True)
class RankInfo:
    """What a rank says of itself."""

    launcher: str
    world_size: int
    host: str
    own_address: str
    """What its host name means there; other nodes' gloo is told to connect to it."""
    gpu: str | None
    """The name that tells its GPU from all others."""


def rendezvous(info: LaunchInfo, address: str, port: int, gpu: str | None, timeout: timedelta) -> dist.Store:
    """Wait for all ranks; the store that they share, for a process group.

    Raises:
        UserError: on every rank that is there, where one is missing, comes twice, counts otherwise than rank
            0, has another's GPU, or can't be reached.
    """
    if info.world_size == 1:
        return dist.HashStore()
    store = _open_store(info, address, port, timeout)
    host = socket.gethostname()
    own = RankInfo(info.launcher, info.world_size, host, _address_of(host), gpu)
    if store.add(f"came/{info.rank}", 1) > 1:
        first = json.loads(store.get(f"rank/{info.rank}"))["host"]
        raise UserError(
            f"two processes call themselves rank {info.rank}, on {first} and on {host}: another run meets "
            f"at {address}:{port} too (give this one another MASTER_PORT), or RANK or --node_rank was given "
            "twice"
        )
    store.set(f"rank/{info.rank}", json.dumps(asdict(own)))
    if info.rank == 0:
        verdict = _judge(store, info.world_size, timeout)
        store.set("verdict", verdict)
    else:
        store.set_timeout(timeout + _GOODBYE)
        verdict = store.get("verdict").decode()
    store.add("heard", 1)
    if verdict:
        if info.rank == 0:
            _let_all_hear(store, info.world_size)
        raise UserError(verdict)
    first = RankInfo(**json.loads(store.get("rank/0")))
    if own.world_size != first.world_size:
        raise UserError(_other_size(info.rank, own, first))
    return store


def _open_store(info: LaunchInfo, address: str, port: int, timeout: timedelta) -> dist.Store:
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = socket.gethostname()
    master = info.rank == 0 and not held_by_torchrun
    try:
        store = dist.TCPStore(
            address, port, is_master=master, timeout=timeout, wait_for_workers=False, multi_tenant=master
        )
    except (dist.DistError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        if master:
            raise UserError(
                f"rank 0 on {host} can't open port {port} for the others ({reason}): another run may have "
                "it; give this one another MASTER_PORT (deepspeed and torchrun: --master_port)"
            ) from None
        raise UserError(
            f"rank {info.rank} on {host} can't reach rank 0 at {address}:{port} ({reason}). Was it "
            "started, is the address (MASTER_ADDR) one of its host's that this host can reach, not 127.0.0.1 "
            "or a login node's, and does no firewall close the port?"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dga_scale/{attempt}", store)


def _judge(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """What is wrong with the ranks that came in time; empty if nothing."""
    keys = [f"rank/{rank}" for rank in range(world_size)]
    missing = []
    try:
        store.wait(keys, timeout)
    except dist.DistError:
        # Asked one by one, not waited for: a short wait may end before a busy store has answered.
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    ranks = {
        rank: RankInfo(**json.loads(store.get(key))) for rank, key in enumerate(keys) if rank not in missing
    }
    if missing:
        there = ", ".join(f"{rank} on {info.host}" for rank, info in list(ranks.items())[:8])
        return (
            f"{len(missing)} of {world_size} ranks did not come within {timeout.total_seconds():g} s: "
            f"{_some(missing)} missing, there: {there}{', ...' if len(ranks) > 8 else ''}. Look at what "
            "the missing ones printed; if one process was meant, unset RANK and WORLD_SIZE"
        )
    return _contradiction(list(ranks.values()))


def _contradiction(ranks: Sequence[RankInfo]) -> str:
    first = ranks[0]
    many_hosts = len({info.host for info in ranks}) > 1
    gpus: dict[str, int] = {}
    for rank, info in enumerate(ranks):
        if info.world_size != first.world_size:
            return _other_size(rank, info, first)
        if info.launcher != first.launcher:
            return (
                f"rank {rank} on {info.host} was started by {info.launcher}, rank 0 on {first.host} by "
                f"{first.launcher}: start all ranks of a run alike, and unset what an earlier launch left"
            )
        if info.gpu is None and first.gpu is not None:
            return f"rank {rank} on {info.host} sees no GPU, rank 0 on {first.host} does: look at its driver"
        if info.gpu is not None and info.gpu in gpus:
            return (
                f"ranks {gpus[info.gpu]} and {rank} have the same GPU of {info.host}: start as many "
                "processes on a node as it has GPUs, and let CUDA_VISIBLE_DEVICES show each all or its own"
            )
        if info.gpu is not None:
            gpus[info.gpu] = rank
        unreachable = info.own_address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ
        if first.gpu is None and many_hosts and unreachable:
            return (
                f"{info.host} takes its own name for {info.own_address} (/etc/hosts), where other "
                "hosts can't reach it: set GLOO_SOCKET_IFNAME to the interface between nodes (see ip addr)"
            )
    return ""


def _other_size(rank: int, info: RankInfo, first: RankInfo) -> str:
    return (
        f"rank {rank} on {info.host} counts {info.world_size} ranks, rank 0 on {first.host} "
        f"{first.world_size}: give every node the same number of nodes and processes"
    )


def _let_all_hear(store: dist.Store, world_size: int) -> None:
    """Rank 0 holds the store: it stays until those who came have read the verdict."""
    deadline = time.monotonic() + _GOODBYE.total_seconds()
    came = sum(store.check([f"came/{rank}"]) for rank in range(world_size))
    while store.add("heard", 0) < came and time.monotonic() < deadline:
        time.sleep(0.05)


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
