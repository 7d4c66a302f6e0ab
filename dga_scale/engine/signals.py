"""Stopping on request: a signal to any one rank ends the run after a step, with everything saved."""

import os
import signal
import time
from types import FrameType

import torch
from torch import Tensor

from dga_scale.engine.cluster import Cluster

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped on a signal; running the same command goes on (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ONE_REQUEST = 1.0
"""Seconds in which signals count as one request: launchers pass it on in several ways. Ctrl-C reaches a rank
from the terminal and from deepspeed, SLURM's signal directly and from the process that holds a container."""


class StopRequest:
    """Remembers a stop signal; a second one, more than ``ONE_REQUEST`` later, leaves at once.

    Committed checkpoints are never touched in place: leaving at once loses only the steps since the last.

    In a SLURM step no signal does that: SIGTERM follows SIGUSR1 at the time limit, and comes again at the end
    of a preemption's grace, and SLURM itself kills what is left KillWait seconds later. A save under way gets
    that time.

    Use as a context manager: the former handlers come back at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._scheduler_kills = "SLURM_STEP_ID" in os.environ

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > ONE_REQUEST and not self._scheduler_kills:
            os._exit(128 + number)


class StopAgreement:
    """All ranks stop after the same step, whichever of them got the signal.

    The flag travels with the loss terms in the one small reduction that a step makes anyway, and is read one
    step later, when it has long arrived: no device is waited for. So does how many saves were written.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._flags: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._previous = [0.0, 0.0]

    def average(self, terms: dict[str, Tensor], requested: bool, saves_written: int = 0) -> dict[str, Tensor]:
        """Mean of each term (a scalar) over ranks; remembers whether any rank asked to stop.

        Every rank has to call it once a step. ``saves_written``: by this rank since the run began.
        """
        self._previous = self._read()
        device = self._cluster.device
        flags = torch.tensor([float(requested), float(saves_written)], device=device)
        sums = self._cluster.sum(torch.cat([torch.stack([t.float() for t in terms.values()]), flags]))
        self._flags = sums[-2:].to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        means = sums[:-2] / self._cluster.world_size
        return dict(zip(terms, means, strict=True))

    def reached(self) -> bool:
        """Whether a rank had asked to stop at the step before the last one that was averaged."""
        return self._previous[0] > 0

    def written(self, saves: int) -> bool:
        """Whether all ranks had written so many saves at that step."""
        return self._previous[1] == saves * self._cluster.world_size

    def _read(self) -> list[float]:
        if self._flags is None:
            return [0.0, 0.0]
        if self._arrived is not None:
            self._arrived.synchronize()
        flags: list[float] = self._flags.tolist()
        return flags
