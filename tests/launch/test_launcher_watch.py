"""Ranks save and stop when their launcher is gone; processes that have none outlive their shell."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dga_scale.checkpoint.store import newest_complete
from dga_scale.launch import launcher_watch
from dga_scale.launch.environment import LaunchInfo, read_launch_info
from dga_scale.launch.launcher_watch import LauncherWatch
from dga_scale.launch.preemption import EXIT_STOPPED, StopRequest
from tests.helpers.forks import launch
from tests.helpers.launches import fork_rank
from tests.helpers.mpi import PROGRAMS
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import REPOSITORY, free_port
from tests.helpers.small import make_world
from tests.test_train import arguments, around_steps

PATIENCE = 120.0
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
INFO = LaunchInfo("torchrun", 0, 1, 0, 1, "127.0.0.1", 29500)
_PR_SET_CHILD_SUBREAPER = 36

Behave = Callable[[Callable[[], None]], int | None]
"""What a rank does. It is given what to call once its launcher may be killed; it returns its exit code."""


def killed_launcher(ranks: int, behave: Behave, *args: Any) -> int:
    """Be the parent of a launcher that is killed once its ranks are ready; the ranks' exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # its orphans come to this process
    heard, said = os.pipe()
    port = free_port()
    launcher = os.fork()
    if launcher == 0:
        for rank in range(ranks):
            fork_rank(rank, ranks, port, behave, lambda: os.write(said, b"."), *args)
        signal.pause()
    os.close(said)
    assert sum(bool(os.read(heard, 1)) for _ in range(ranks)) == ranks, "a rank ended early"
    os.kill(launcher, signal.SIGKILL)
    codes = []
    for _ in range(ranks + 1):
        pid, status = os.wait()
        codes += [] if pid == launcher else [os.waitstatus_to_exitcode(status)]
    assert len(set(codes)) == 1, codes
    return codes[0]


def trains(ready: Callable[[], None], flags: list[str]) -> None:
    """``dga_train.py``: the launcher is killed in the third step, which lasts until that is heard."""
    from dga_scale.train import cli

    @contextlib.contextmanager
    def waiting(trainer: Any, batches: Any) -> Iterator[None]:
        if batches.step == 2:
            ready()
            while not StopRequest._entered.requested:  # type: ignore[union-attr]
                time.sleep(0.01)
        yield

    cli.end_rank = sys.exit  # type: ignore[assignment]
    sys.argv = ["dga_train.py", *flags]
    with around_steps(waiting), no_pictures():
        cli.train_command()


def test_ranks_without_a_launcher_save_and_stop(tmp_path: Path) -> None:
    world, run = make_world(tmp_path), tmp_path / "run"
    launched = launch(1, killed_launcher, 2, trains, arguments(world, run, method="mlm", eval_steps=1000))
    assert launched.wait() == [EXIT_STOPPED], launched.output(0)
    said = launched.output(0)
    assert said.count("the launcher (torchrun) is gone: the run saves and stops") == 1, said
    assert "stopped after step 4 as asked" in said
    checkpoint = newest_complete(run)
    assert checkpoint is not None
    assert checkpoint.step == 4


def does_not_heed(ready: Callable[[], None]) -> int:
    """Waits, as if for another rank, which is gone with the launcher."""
    launcher_watch.GRACE = 0.1
    with StopRequest() as stop, LauncherWatch(read_launch_info(os.environ)).asking(stop):
        ready()
        time.sleep(PATIENCE)
    return 0


def has_not_joined(ready: Callable[[], None]) -> int:
    with StopRequest(joined=False) as stop, LauncherWatch(read_launch_info(os.environ)).asking(stop):
        ready()
        time.sleep(PATIENCE)
    return 0


@pytest.mark.parametrize("behave", [does_not_heed, has_not_joined])
def test_a_rank_that_can_not_save_ends_all_the_same(behave: Behave) -> None:
    launched = launch(1, killed_launcher, 1, behave)
    assert launched.wait() == [EXIT_STOPPED], launched.output(0)
    said = "error: the launcher (torchrun) is gone, and rank 0 could not save within 0.1 s."
    assert (said in launched.output(0)) == (behave is does_not_heed)


FIRST = "in this container the first process may be a launcher"


def first_process_may_be_a_launcher() -> bool:
    return "python" in " ".join(psutil.Process(1).cmdline()[:1])


def orphaned_before_it_looks(folder: Path) -> None:
    if os.fork():
        os._exit(0)
    parent = os.getppid()
    while parent != 1 and os.getppid() == parent:
        time.sleep(0.01)
    with StopRequest() as stop, LauncherWatch(INFO).asking(stop):
        while not stop.requested:
            time.sleep(0.01)
    (folder / "heard").touch()
    os._exit(0)


def test_a_launcher_that_was_gone_before_the_rank_looked(tmp_path: Path) -> None:
    if first_process_may_be_a_launcher():
        pytest.skip(FIRST)
    assert launch(1, orphaned_before_it_looks, tmp_path).wait() == [0]
    wait_for(tmp_path / "heard")


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.05)
    return file.read_text()


@pytest.mark.parametrize("launcher", ["python", "environment"])
def test_without_a_launcher_nothing_is_watched(launcher: str) -> None:
    info = LaunchInfo(launcher, 0, 1, 0, 1, "127.0.0.1", 29500)
    with StopRequest() as stop, LauncherWatch(info).asking(stop):
        assert "launcher" not in [thread.name for thread in threading.enumerate()]


# --- which processes are the launcher's ------------------------------------------------------------------

SHOW = """
import os, sys
from dga_scale.launch.environment import read_launch_info
from dga_scale.launch.launcher_watch import LauncherWatch
watch = LauncherWatch(read_launch_info(os.environ))
print(*[process.pid for process in watch._processes], watch._gone)
"""


def test_wrappers_below_the_launcher_count_and_scripts_above_do_not(tmp_path: Path) -> None:
    """A script starts ``mpirun``, which starts ``prted``, which starts a wrapper, which starts the rank."""
    variables = " ".join(
        f"OMPI_COMM_WORLD_{n}={v}"
        for n, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "0101", strict=True)
    )
    steps = [
        ("wrapper", f"{sys.executable} -c '{SHOW}'"),
        ("prted", f"{variables} {tmp_path}/wrapper"),
        ("mpirun", f"{tmp_path}/prted"),
        ("script", f"{tmp_path}/mpirun"),
    ]
    for name, command in steps:
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\necho {name} $$\n{command}\ntrue\n")
        file.chmod(0o755)
    out = subprocess.run([tmp_path / "script"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    *lines, last = out.stdout.splitlines()
    pids = dict(line.split() for line in lines)
    assert last.split() == [*(pids[name] for name in ("wrapper", "prted", "mpirun")), "False"]


LAUNCH = f"""
import os, subprocess, sys
from pathlib import Path
while os.getppid() == int(sys.argv[1]):  # the runner has not been killed yet
    pass
ranks = {RANK | {"CROSS_RANK": "0"}}
shown = subprocess.check_output([sys.executable, "-c", {SHOW!r}], env=os.environ | ranks, text=True)
Path("shown.tmp").write_text(shown)
Path("shown.tmp").rename("shown")
"""


def test_deepspeed_was_killed_before_its_launch_had_started_ranks(tmp_path: Path) -> None:
    """``deepspeed.launcher.launch`` (here one of our own) is there; its runner never was for the rank."""
    if first_process_may_be_a_launcher():
        pytest.skip(FIRST)
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "launch.py").write_text(LAUNCH)
    launch = f"{sys.executable} -m deepspeed.launcher.launch"
    for argument, gone in (("--enable_each_rank_log=None", "True"), ("--by_hand", "False")):
        command = ["bash", "-c", f"{launch} $$ {argument} & true"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
        assert wait_for(tmp_path / "shown").split()[1:] == [gone]
        (tmp_path / "shown").unlink()


HEED = """
import os, sys, time
from pathlib import Path
from dga_scale.launch.environment import read_launch_info
from dga_scale.launch.launcher_watch import LauncherWatch
watch, folder = LauncherWatch(read_launch_info(os.environ)), Path(sys.argv[-1])
from dga_scale.launch.preemption import StopRequest
with StopRequest() as stop, watch.asking(stop):
    (folder / "ready").touch()
    while not stop.requested:
        time.sleep(0.05)
(folder / "heard").touch()
os._exit(0)
"""


def test_deepspeed_itself_is_killed(tmp_path: Path) -> None:
    """Its runner: ``deepspeed.launcher.launch`` below it lives on, and would let the ranks train."""
    (tmp_path / "rank.py").write_text(HEED)
    command = [
        f"{PROGRAMS}/deepspeed",
        "--num_accelerators=1",
        f"--master_port={free_port()}",
        f"{tmp_path}/rank.py",
        f"{tmp_path}",
    ]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
    }
    runner = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path / "ready")
    runner.kill()
    runner.wait()
    wait_for(tmp_path / "heard")
