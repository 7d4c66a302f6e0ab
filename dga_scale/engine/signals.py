"""Stopping on request: a signal to any one rank ends the run after a step, with everything saved."""

import os
import signal
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped on a signal; running the same command goes on (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal; a second one leaves at once.

    Committed checkpoints are never touched in place, so leaving at once loses only the steps since the last one.
    Use as a context manager: the former handlers come back at the end.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
