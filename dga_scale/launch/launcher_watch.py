"""Stop when the launcher is gone, which nobody else would notice.

A launcher that is killed (``kill -9``, out of memory) takes nothing along: its ranks would train on for ever,
unseen, beside those of the next launch. So each rank looks once a second for the processes that started it:
its parents up to the launcher, wrapper scripts between them included, and what of the launcher stands above
(``deepspeed`` above ``deepspeed.launcher.launch``, ``mpiexec`` above ``hydra_pmi_proxy``). When one of them
is gone, the rank acts as on a stop signal, and ends after ``GRACE`` seconds whatever it does.

Processes without a launcher, and those whose RANK was set by hand or by a script, outlive the shell that
started them, as ``nohup`` and ``&`` promise.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dga_scale.launch.environment import LaunchInfo, has_variable
from dga_scale.streams import write_stderr

if TYPE_CHECKING:  # it imports torch, which the watch does not wait for
    from dga_scale.launch.preemption import StopRequest

GRACE = 120.0
"""Seconds that ranks have to save in. Those they wait for may be gone, with the launcher."""

_INTERVAL = 1.0
_VARIABLES = {
    "torchrun": "TORCHELASTIC_RUN_ID",
    "deepspeed": "CROSS_RANK",
    "mpirun": "OMPI_COMM_WORLD_RANK",
    "mpiexec": "PMI_RANK",
    "srun": "SLURM_STEP_ID",
}
"""What a launcher sets for its ranks and does not have itself."""
_PROGRAMS = (
    *("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpirun", "orterun", "orted", "prterun", "prted"),
    *("mpiexec", "mpiexec.hydra", "hydra_pmi_proxy"),
    *("srun", "slurmstepd"),
)


_OF_RUNNER = "--enable_each_rank_log=None"
"""What ``deepspeed`` passes to ``deepspeed.launcher.launch``, which then was not started by hand."""


class LauncherWatch:
    """The launcher's processes above this one. Build it early: what ends before that is hard to see.

    Args:
        info: What the launcher says about this process.
    """

    def __init__(self, info: LaunchInfo) -> None:
        self._info = info
        self._processes: list[psutil.Process] = []
        self._gone = False
        while info.launcher in _VARIABLES:
            with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended: what is there now?
                self._find(_VARIABLES[info.launcher])
                break

    def _find(self, variable: str) -> None:
        parents = _visible_parents()
        knows = [has_variable(process, variable) for process in parents]
        if all(knows):  # in a container, the launcher outside it: nothing to see
            return
        count = knows.index(False) + 1
        launcher = parents[count - 1]
        # In a container a launcher may be the first process.
        self._gone = _adopts_orphans(launcher) and not _is_launcher(launcher, any_python=True)
        while count < len(parents) and _is_launcher(parents[count]):
            count += 1
        if count < len(parents) and _adopts_orphans(parents[count]):
            self._gone |= _OF_RUNNER in _command(parents[count - 1])
        self._processes = parents[:count]

    @contextlib.contextmanager
    def asking(self, stop: "StopRequest") -> Iterator[None]:
        """Ask for a stop inside a ``with`` block when the launcher is gone; a thread of its own looks."""
        ended = threading.Event()
        if self._processes:
            threading.Thread(target=self._watch, args=(stop, ended), name="launcher", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, stop: "StopRequest", ended: threading.Event) -> None:
        while not self._gone:
            if ended.wait(_INTERVAL):
                return
            self._gone = not all(map(_runs, self._processes))
        gone = f"the launcher ({self._info.launcher}) is gone"
        if self._info.local_rank == 0:
            write_stderr(f"{gone}: the run saves and stops. The same command resumes it.")
        stop.ask()
        if not ended.wait(GRACE):
            write_stderr(f"error: {gone}, and rank {self._info.rank} could not save within {GRACE:g} s.")
            stop.end()


def _visible_parents() -> list[psutil.Process]:
    """Return this process's parents, nearest first; other users' may be hidden (``hidepid``)."""
    found = [psutil.Process()]
    with contextlib.suppress(psutil.AccessDenied):
        while (parent := found[-1].parent()) is not None:
            found.append(parent)
    return found[1:]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _adopts_orphans(process: psutil.Process) -> bool:
    """Return whether a process is init or a user's systemd."""
    return process.pid == 1 or process.name() == "systemd"


def _is_launcher(process: psutil.Process, any_python: bool = False) -> bool:
    """Return whether a process runs one of ``_PROGRAMS``, or a Python program where any may be one."""
    command = _command(process)
    program = Path(command[0]).name if command else process.name()
    if "python" not in program:
        return program in _PROGRAMS or process.name() in _PROGRAMS
    script = next((word for word in command[1:] if not word.startswith("-")), "")
    return any_python or Path(script).name in _PROGRAMS


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return []
