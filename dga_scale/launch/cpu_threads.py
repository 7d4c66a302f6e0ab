"""How many threads a rank computes with: the ranks of a machine share its cores.

Left alone, torch takes all cores on every rank: with 8 ranks each core is wanted eight times, for CPU ranks
in every operation, beside GPUs in an offloaded optimizer.
"""

import os
import socket
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

_SET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which users (and torchrun, which sets 1) decide on threads themselves."""

Rank = tuple[str, frozenset[int], Fraction | None]
"""What a rank says of itself: its host, the cores it may use, and how many at a time (None: all)."""


def share_cores(all_gather_object: Callable[[Any], list[Any]]) -> None:
    """Take this rank's share of its machine's cores; every rank has to call it.

    ``OMP_NUM_THREADS``, and a smaller number that torch was given, win.
    """
    own = (socket.gethostname(), frozenset(os.sched_getaffinity(0)), cpu_limit(Path("/sys/fs/cgroup")))
    ranks: list[Rank] = all_gather_object(own)
    if not any(name in os.environ for name in _SET):
        torch.set_num_threads(min(torch.get_num_threads(), share(own, ranks)))


def share(own: Rank, ranks: list[Rank]) -> int:
    """How many cores a rank gets of those it may use, each divided among the ranks that may use it too.

    Launchers bind ranks to cores of their own, or let all use all. At least 1.
    """
    host, cores, limit = own
    beside = [others for name, others, _ in ranks if name == host]
    found = sum((Fraction(1, sum(core in others for others in beside)) for core in cores), Fraction(0))
    if limit is not None:
        found = min(found, limit / len(beside))
    return max(1, int(found))


def cpu_limit(root: Path) -> Fraction | None:
    """Cores' worth of time that a container gets, by cgroups' version 2 or 1; None: no limit."""
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
