"""Set how many threads a rank computes with: the ranks of a machine share its cores.

By default torch takes all cores on every rank. With 8 ranks each core is then oversubscribed eight times: on
CPUs in every operation, beside GPUs in an offloaded optimizer.
"""

import os
import socket
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The variables by which users (and torchrun, which sets 1) decide on threads themselves."""

RankCores = tuple[str, frozenset[int], Fraction | None]
"""The cores of a rank: its host, the cores it may use, and how many at a time (None: all of them)."""


def share_cores(all_gather_object: Callable[[Any], list[Any]]) -> None:
    """Limit torch's threads to this rank's share of its machine's cores; every rank has to call it.

    ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS`` take precedence, and so does a smaller number that torch was
    given.
    """
    own = (socket.gethostname(), frozenset(os.sched_getaffinity(0)), cpu_limit(Path("/sys/fs/cgroup")))
    ranks: list[RankCores] = all_gather_object(own)
    if not any(name in os.environ for name in _THREAD_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), share(own, ranks)))


def share(own: RankCores, ranks: list[RankCores]) -> int:
    """Return how many cores a rank gets: each core is divided among the ranks that may use it; at least 1.

    Launchers either bind each rank to cores of its own or let all ranks use all cores.
    """
    host, cores, limit = own
    beside = [others for name, others, _ in ranks if name == host]
    found = sum((Fraction(1, sum(core in others for others in beside)) for core in cores), Fraction(0))
    if limit is not None:
        found = min(found, limit / len(beside))
    return max(1, int(found))


def cpu_limit(root: Path) -> Fraction | None:
    """Return how many cores' worth of time a container gets, by cgroups version 2 or 1; None: no limit."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return Fraction(int(quota), int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroups here, or "max"
        return None
