"""Stopping on request: a signal to any one rank ends the run after a step, with everything saved."""

import os
import signal
import socket
import time
from threading import Thread
from types import FrameType
from typing import ClassVar

import torch
from torch import Tensor

from dga_scale.launch.world import Cluster

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped on a signal; running the same command goes on (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ONE_REQUEST = 1.0
"""Seconds in which signals count as one request: launchers pass it on in several ways. Ctrl-C reaches a rank
from the terminal and from deepspeed, SLURM's signal directly and from the process that holds a container."""


class StopRequest:
    """Remembers a stop signal; a second one, more than ``ONE_REQUEST`` later, leaves at once.

    Committed checkpoints are never touched in place: leaving at once loses only the steps since the last. A
    thread hears the signals, so that the second one works while the main thread waits for other ranks.

    In a SLURM step no signal does that: SIGTERM follows SIGUSR1 at the time limit, and comes again at the end
    of a preemption's grace, and SLURM itself kills what is left KillWait seconds later. A save under way gets
    that time.

    Use as a context manager: the former handlers come back at the end. Entered inside another one it is that
    one: what was asked for earlier is not forgotten.

    Args:
        joined: False where this rank has still to find the others: until ``joined`` is set, a signal leaves
            at once with ``EXIT_STOPPED``, as nothing was begun that could be lost.

    """

    _entered: "ClassVar[StopRequest | None]" = None

    def __init__(self, joined: bool = True) -> None:
        self.requested, self.joined = False, joined
        self._since = 0.0
        self._scheduler_kills = "SLURM_STEP_ID" in os.environ

    def __enter__(self) -> "StopRequest":
        if StopRequest._entered is not None:
            return StopRequest._entered
        StopRequest._entered = self
        ours, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._former_wake = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _by_the_thread) for number in STOP_SIGNALS}
        Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if StopRequest._entered is self:
            self.forget()
            self._wake.close()

    def forget(self) -> None:
        """Put the former handlers back."""
        StopRequest._entered = None
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wake)

    def _listen(self, ours: socket.socket) -> None:
        with ours:
            while heard := ours.recv(1):
                if heard[0] in STOP_SIGNALS:
                    self._handle(heard[0])

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if not self.joined:
            os._exit(EXIT_STOPPED)
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > ONE_REQUEST and not self._scheduler_kills:
            os._exit(128 + number)


def _by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python has written the signal's number where ``StopRequest`` listens."""


def _forget_in_a_child() -> None:
    # A worker that is ended by SIGTERM has to die of it, and must not be heard by its parent.
    if StopRequest._entered is not None:
        StopRequest._entered.forget()


os.register_at_fork(after_in_child=_forget_in_a_child)


class StopConsensus:
    """All ranks stop after the same step, whichever of them got the signal.

    The flag travels with the loss terms in the one small reduction that a step makes anyway, and is read one
    step later, when it has long arrived: no device is waited for. So does how many saves were written. What
    each rank has to say for the log goes along too.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._flags: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._previous = [0.0, 0.0]

    def average(
        self,
        terms: dict[str, Tensor],
        requested: bool,
        saves_written: int = 0,
        own: dict[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Mean of each term (a scalar) over ranks; remembers whether any rank asked to stop.

        Every rank has to call it once a step.

        Args:
            terms: of this rank.
            requested: whether this rank is asked to stop.
            saves_written: by this rank since the run began.
            own: numbers of this rank that all are to see: each comes back as (ranks,), in rank order. All
                ranks have to give the same names.

        """
        self._previous = self._read()
        cluster, own = self._cluster, own or {}
        # Filled on the device: a copy of a tensor made here would wait for what the device is doing.
        flags = torch.zeros(2, device=cluster.device)
        ranks = torch.zeros(len(own), cluster.world_size, device=cluster.device)
        for place, value in zip(
            (*flags, *ranks[:, cluster.rank]), (requested, saves_written, *own.values()), strict=True
        ):
            place.fill_(float(value))
        sums = cluster.sum(
            torch.cat([torch.stack([t.float() for t in terms.values()]), flags, ranks.flatten()])
        )
        means, flags, ranks = sums.split([len(terms), 2, ranks.numel()])
        self._flags = flags.to("cpu", non_blocking=True)
        if cluster.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        found = dict(zip(terms, means / cluster.world_size, strict=True))
        return found | dict(zip(own, ranks.view(len(own), cluster.world_size), strict=True))

    def now(self, requested: bool) -> bool:
        """Whether any rank asks to stop, where nothing else is being reduced; every rank has to call it."""
        return bool(self._cluster.sum(torch.tensor(float(requested), device=self._cluster.device)) > 0)

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
