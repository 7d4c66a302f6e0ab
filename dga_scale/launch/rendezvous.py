"""Rendezvous of a run's ranks, with a clear error where it fails.

Before any process group exists, each rank writes a ``RankInfo`` into a key-value store that rank 0 serves at
the master address (torchrun serves one itself). Rank 0 checks the entries, and all ranks read the result.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from dga_scale.errors import UserError
from dga_scale.launch.environment import LaunchInfo

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long the ranks wait for the last of them to start, and then for their connections."""
_SAYS_AFTER = timedelta(seconds=10)
"""How long a rank waits for others in silence."""
_RESULT_TIMEOUT = timedelta(seconds=10)
"""How long rank 0 keeps a store with an error open for the others, and how much longer these wait for it."""


@dataclass(frozen=True)
class RankInfo:
    """What a rank publishes about itself in the rendezvous."""

    launcher: str
    world_size: int
    host: str
    own_address: str
    """The address its host name resolves to on that host, to which gloo on other nodes connects."""
    gpu: str | None
    """The unique id of its GPU; None: the rank computes on CPUs."""


def rendezvous(info: LaunchInfo, address: str, port: int, gpu: str | None, timeout: timedelta) -> dist.Store:
    """Wait for all ranks, check that they fit together, and return their shared store for a process group.

    Raises:
        UserError: A rank is missing, joined twice, has another world size than rank 0, shares a GPU with
            another rank, or can't be reached. Every rank that joined raises it.
    """
    if info.world_size == 1:
        return dist.HashStore()
    said = threading.Timer(
        _SAYS_AFTER.total_seconds(), _say_waiting, [info, f"rank 0 at {address}:{port}", timeout]
    )
    said.daemon = True
    said.start()
    try:
        store = _open_store(info, address, port, timeout)
    finally:
        said.cancel()
    host = socket.gethostname()
    own = RankInfo(info.launcher, info.world_size, host, _address_of(host), gpu)
    if store.add(f"joined/{info.rank}", 1) > 1:
        first = json.loads(store.get(f"rank/{info.rank}"))["host"]
        raise UserError(
            f"two processes are rank {info.rank}, on {first} and on {host}: another run uses "
            f"{address}:{port} too (give this one another MASTER_PORT), or RANK or --node_rank was given "
            "twice"
        )
    store.set(f"rank/{info.rank}", json.dumps(asdict(own)))
    if info.rank == 0:
        missing = _missing(store, info.world_size, min(timeout, _SAYS_AFTER))
        if missing and timeout > _SAYS_AFTER:
            _say_waiting(
                info, f"ranks {_some(missing)} of {info.world_size}, to join at {address}:{port}", timeout
            )
            missing = _missing(store, info.world_size, timeout - _SAYS_AFTER)
        problem = _find_problem(store, info.world_size, missing, timeout)
        if problem:  # before any rank leaves: the launcher ends the others then
            UserError(problem).report()
        store.set("problem", problem)
    else:
        store.set_timeout(timeout + _RESULT_TIMEOUT)
        problem = store.get("problem").decode()
    store.add("read", 1)
    if problem:
        if info.rank == 0:
            _wait_for_readers(store, info.world_size)
        error = UserError(problem)
        error.reported = True  # by rank 0, for all
        raise error
    first = RankInfo(**json.loads(store.get("rank/0")))
    if own.world_size != first.world_size:
        raise UserError(_other_size(info.rank, own, first))
    return store


def _open_store(info: LaunchInfo, address: str, port: int, timeout: timedelta) -> dist.Store:
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = socket.gethostname()
    master = info.rank == 0 and not served_by_torchrun
    try:
        store = dist.TCPStore(
            address, port, is_master=master, timeout=timeout, wait_for_workers=False, multi_tenant=master
        )
    except (dist.DistError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        if master:
            raise UserError(
                f"rank 0 on {host} can't open port {port} for the other ranks ({reason}): another run may "
                "use it; give this one another MASTER_PORT (deepspeed and torchrun: --master_port)"
            ) from None
        raise UserError(
            f"rank {info.rank} on {host} can't reach rank 0 at {address}:{port} ({reason}). Was it "
            "started, is the address (MASTER_ADDR) one of its host's that this host can reach, not 127.0.0.1 "
            "or a login node's, and does no firewall close the port?"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dga_scale/{attempt}", store)


def _say_waiting(info: LaunchInfo, awaited: str, timeout: timedelta) -> None:
    set_by = (
        "RANK and WORLD_SIZE come from the environment: unset them for a single process"
        if info.launcher == "environment"
        else f"started by {info.launcher}"
    )
    print(
        f"rank {info.rank} on {socket.gethostname()} waits for {awaited}, {timeout.total_seconds():g} s at "
        f"most ({set_by})",
        file=sys.stderr,
        flush=True,
    )


def _missing(store: dist.Store, world_size: int, timeout: timedelta) -> list[int]:
    """Wait for all ranks to join, and return those that have not."""
    keys = [f"rank/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistError:
        # Asked one by one, not waited for: a short wait may end before a busy store has answered.
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def _find_problem(store: dist.Store, world_size: int, missing: Sequence[int], timeout: timedelta) -> str:
    """Describe what is wrong with the ranks that joined in time; empty where all is well."""
    keys = [f"rank/{rank}" for rank in range(world_size)]
    ranks = {
        rank: RankInfo(**json.loads(store.get(key))) for rank, key in enumerate(keys) if rank not in missing
    }
    if missing:
        joined = ", ".join(f"{rank} on {info.host}" for rank, info in list(ranks.items())[:8])
        return (
            f"{len(missing)} of {world_size} ranks did not join within {timeout.total_seconds():g} s: "
            f"{_some(missing)} missing, joined: {joined}{', ...' if len(ranks) > 8 else ''}. Read what "
            "the missing ranks printed; if one process was meant, unset RANK and WORLD_SIZE"
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
            return f"rank {rank} on {info.host} sees no GPU, rank 0 on {first.host} does: check its driver"
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
                f"{info.host} resolves its own name to {info.own_address} (/etc/hosts), where other "
                "hosts can't reach it: set GLOO_SOCKET_IFNAME to the interface between nodes (see ip addr)"
            )
    return ""


def _other_size(rank: int, info: RankInfo, first: RankInfo) -> str:
    return (
        f"rank {rank} on {info.host} counts {info.world_size} ranks, rank 0 on {first.host} "
        f"{first.world_size}: give every node the same number of nodes and processes"
    )


def _wait_for_readers(store: dist.Store, world_size: int) -> None:
    """Keep rank 0, which serves the store, alive until the ranks that joined have read the problem."""
    deadline = time.monotonic() + _RESULT_TIMEOUT.total_seconds()
    joined = sum(store.check([f"joined/{rank}"]) for rank in range(world_size))
    while store.add("read", 0) < joined and time.monotonic() < deadline:
        time.sleep(0.05)


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
