"""What a second stop signal does: nothing, as the echo of the first and under SLURM; else it ends at once."""

import os
import subprocess
import sys

import pytest

from tests.helpers.ranks import REPOSITORY

PROGRAM = """
import os, signal, sys, time
from dga_scale.launch.preemption import ONE_REQUEST, StopRequest

with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # the echo
    while not stop.requested:
        time.sleep(0.01)
    print("echo survived", flush=True)
    time.sleep(ONE_REQUEST + 0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5 if "SLURM_STEP_ID" in os.environ else 100)
print("second survived", flush=True)
os.kill(os.getpid(), signal.SIGTERM)  # the former handler is back
"""


@pytest.mark.parametrize(
    ("environment", "said", "code"),
    [
        ({}, "echo survived\n", 128 + 15),
        ({"SLURM_STEP_ID": "0"}, "echo survived\nsecond survived\n", -15),
    ],
)
def test_a_second_signal(environment: dict[str, str], said: str, code: int) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "SLURM_STEP_ID"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.stdout, result.returncode) == (said, code), result.stderr
