"""Stop on request: a signal to any one rank ends the run after a step, with everything saved."""

import os
import signal
import socket
import time
from threading import Thread
from types import FrameType
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from dga_scale.launch.world import Cluster

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped on a signal; the same command resumes it (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ONE_REQUEST = 1.0
"""Seconds within which signals count as one request, because launchers forward it in several ways.

Ctrl-C reaches a rank from the terminal and from deepspeed; SLURM's signal arrives directly and from the
process that holds a container.
"""


class StopRequest:
    """Remembers a stop signal; a second one, more than ``ONE_REQUEST`` later, ends the process at once.

    Committed checkpoints are never changed in place, so ending at once costs only the steps since the last
    one. A thread receives the signals: the second one works while the main thread waits for other ranks.

    In a SLURM step no second signal ends the process: SIGTERM follows SIGUSR1 at the time limit and comes
    again at the end of a preemption's grace period, and SLURM itself kills what is left KillWait seconds
    later. A save that is being written gets that time.

    Used as a context manager, it restores the former handlers at the end. Entered inside another request, it
    returns that one, so that an earlier signal is not forgotten.

    Args:
        joined: False where this rank has not joined the others yet: until ``joined`` is set, a signal ends
            the process at once with ``EXIT_STOPPED``, because no work is lost.

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
        self._former = {number: signal.signal(number, _leave_to_thread) for number in STOP_SIGNALS}
        Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if StopRequest._entered is self:
            self.restore_handlers()
            self._wake.close()

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were there before."""
        StopRequest._entered = None
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wake)

    def _listen(self, ours: socket.socket) -> None:
        with ours:
            while heard := ours.recv(1):
                if heard[0] in STOP_SIGNALS:
                    self._handle(heard[0])

    def ask(self) -> None:
        """Ask for the stop, as the first signal does."""
        if not self.joined:
            self.end()
        if not self.requested:
            self.requested, self._since = True, time.monotonic()

    def end(self) -> NoReturn:
        """End the process at once, as one that was stopped."""
        os._exit(EXIT_STOPPED)

    def _handle(self, number: int) -> None:
        if not self.requested:
            self.ask()
        elif time.monotonic() - self._since > ONE_REQUEST and not self._scheduler_kills:
            os._exit(128 + number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python has written the signal's number to the socket that ``StopRequest`` reads."""


def _restore_handlers_in_child() -> None:
    # SIGTERM has to end a worker process, and its parent must not take the signal for its own.
    if StopRequest._entered is not None:
        StopRequest._entered.restore_handlers()


os.register_at_fork(after_in_child=_restore_handlers_in_child)


class Stopped(Exception):
    """What ends work that no checkpoint holds, on every rank alike, where a run was asked to stop."""


class StopConsensus:
    """Makes all ranks stop after the same step, whichever of them received the signal.

    The stop flag is reduced together with the loss terms, in the one small reduction that a step makes
    anyway, and is read one step later, when the copy is complete: the host never waits for the device. The
    number of saves written and the per-rank numbers for the log are reduced with it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._flags: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._previous = [0.0, 0.0]

    def average(
        self,
        terms: dict[str, Tensor],
        requested: bool,
        saves_written: int = 0,
        own: dict[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Average each term over the ranks, and remember whether any rank asked to stop.

        Every rank has to call it once a step.

        Args:
            terms: The loss terms of this rank, each a scalar tensor.
            requested: Whether this rank was asked to stop.
            saves_written: The number of saves that this rank has written since the run began.
            own: Numbers of this rank that all ranks are to see. All ranks have to give the same names.

        Returns:
            The mean of each term, a scalar, and each name of ``own`` with a tensor (ranks,) in rank order.
        """
        self._previous = self._read()
        cluster, own = self._cluster, own or {}
        # Filled on the device: a copy of a tensor made here would wait for what the device is doing.
        flags = torch.zeros(2, device=cluster.device)
        ranks = torch.zeros(len(own), cluster.world_size, device=cluster.device)
        for entry, value in zip(
            (*flags, *ranks[:, cluster.rank]), (requested, saves_written, *own.values()), strict=True
        ):
            entry.fill_(float(value))
        sums = cluster.sum(
            torch.cat([torch.stack([t.float() for t in terms.values()]), flags, ranks.flatten()])
        )
        means, flags, ranks = sums.split([len(terms), 2, ranks.numel()])
        self._flags = flags.to("cpu", non_blocking=True)
        if cluster.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        found = dict(zip(terms, means / cluster.world_size, strict=True))
        return found | dict(zip(own, ranks.view(len(own), cluster.world_size), strict=True))

    def now(self, requested: bool) -> bool:
        """Return whether any rank asks to stop, with a reduction of its own; every rank has to call it."""
        return bool(self._cluster.sum(torch.tensor(float(requested), device=self._cluster.device)) > 0)

    def reached(self) -> bool:
        """Return whether any rank had asked to stop at the step before the last averaged one."""
        return self._previous[0] > 0

    def written(self, saves: int) -> bool:
        """Return whether all ranks had written ``saves`` saves at the step before the last averaged one."""
        return self._previous[1] == saves * self._cluster.world_size

    def _read(self) -> list[float]:
        if self._flags is None:
            return [0.0, 0.0]
        if self._copied is not None:
            self._copied.synchronize()
        flags: list[float] = self._flags.tolist()
        return flags
