"""Stdout and stderr that are gone: a command's work goes on, and what was its result is missed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.train.trainer import Trainer
from tests.helpers.forks import launch
from tests.helpers.kills import logged
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import SmallWorld, make_world
from tests.helpers.stops import ask_to_stop
from tests.test_train import arguments

COMMAND = """
import os, sys
from pathlib import Path
from dga_scale.errors import run_main

def main():
    for line in range(3):
        print("line", line, flush=True)
        os.write(1, b"of a library\\n")
    with open(sys.argv[1], "w") as stream:
        stream.write("work")
    return 0

run_main(main, prints_result=sys.argv[2] == "result")
"""


def run(kind: str, redirect: str, file: Path) -> tuple[int, str]:
    """Run the command above with nobody at the other end of its stdout; its exit code, and its stderr."""
    read, write = os.pipe()
    os.close(read)
    python = [sys.executable, *(["-u"] if kind == "result" else []), "-c", COMMAND, str(file), kind]
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {redirect}', "bash", *python],
        cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True, timeout=240,
    )  # fmt: skip
    os.close(write)
    assert file.read_text() == "work"
    file.unlink()
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("redirect", "reason"),
    [
        ("", "Broken pipe"),
        ("> /dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
        (">&- <&-", "Bad file descriptor"),
        (">&- 2>&-", None),
        ("> /dev/full 2> /dev/full", None),
    ],
)
def test_output_that_can_not_be_written(tmp_path: Path, redirect: str, reason: str | None) -> None:
    error = f"error: stdout: {reason}\n" if reason and redirect else ""
    assert run("result", redirect, tmp_path / "file") == (1, error)
    note = f"note: nothing is printed any more (stdout: {reason}); the work goes on\n" if reason else ""
    assert run("progress", redirect, tmp_path / "file") == (0, note)


def trains(flags: list[str], stop_at: int) -> None:
    """``dga_train.py`` whose stdout and stderr are gone after its first step."""
    from dga_scale.train import cli

    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        if batches.step == 1:
            for number in (1, 2):
                read, write = os.pipe()
                os.close(read)
                os.dup2(write, number)
        if batches.step == stop_at:
            ask_to_stop()
        return original(self, batches)

    Trainer.step = step  # type: ignore[method-assign]
    cli.end_rank = sys.exit  # type: ignore[assignment]
    sys.argv = ["dga_train.py", *flags]
    with no_pictures():
        cli.train_command()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("stop_at", "code", "steps"), [(-1, 0, 6), (3, EXIT_STOPPED, 5)])
def test_a_run_goes_on_without_output(
    world: SmallWorld, tmp_path: Path, stop_at: int, code: int, steps: int
) -> None:
    run = tmp_path / "run"
    launched = launch(1, trains, arguments(world, run, method="mlm", eval_steps=1000), stop_at)
    assert launched.wait() == [code]
    assert list(logged(run)) == list(range(1, steps + 1))
    said = launched.output(0)
    assert "step 1/6" in said
    assert "step 2/6" not in said
