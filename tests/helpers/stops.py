"""Signals that ask a run to stop, sent from within."""

import os
import signal
import time

from dga_scale.launch.preemption import StopRequest


def ask_to_stop(number: int = signal.SIGTERM) -> None:
    """Send this process a stop signal, and wait until its thread has heard it.

    A busy machine may leave that thread waiting for longer than small steps take.
    """
    request = StopRequest._entered
    assert request is not None, "nobody listens"
    os.kill(os.getpid(), number)
    while not request.requested:
        time.sleep(0.001)
