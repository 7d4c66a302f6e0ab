"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, with all state in one folder.

Runs as the current user; daemons of the machine's own are neither needed nor touched.
"""

import contextlib
import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.helpers.ranks import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node1", "node2")
CPUS = 4
"""Of each node, as SLURM counts them; how many the machine has does not matter."""
_START_SECONDS = 120.0

_CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait=60
MinJobAge=7200
MpiDefault=none
NodeName={nodes} NodeHostname=localhost NodeAddr=localhost Port={node_ports} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=60 State=UP
"""


def missing_daemons() -> list[str]:
    """What of SLURM is not installed here."""
    return [name for name in DAEMONS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    """Use as a context manager; within, ``SLURM_CONF`` leads sbatch and its like to this SLURM.

    Args:
        folder: for all its state, empty.
        node_timeout: seconds of silence after which a node is taken to be down; SLURM's default is 300.

    """

    def __init__(self, folder: Path, node_timeout: int = 300) -> None:
        self._folder, self._node_timeout = folder, node_timeout
        self.config = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmCluster":
        folder = self._folder
        folder.chmod(0o755)  # munge refuses a folder that others may write
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.config.write_text(
            _CONFIG.format(
                folder=folder,
                user=getpass.getuser(),
                nodes=",".join(NODES),
                controller_port=free_port(),
                node_ports=",".join(str(free_port()) for _ in NODES),
                cpus=CPUS,
                node_timeout=self._node_timeout,
            )
        )
        self._former = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.config)
        try:
            munge = {
                name: folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
            }
            self._start("munged", "--foreground", "--force", f"--key-file={key}",
                        *(f"--{name}={path}" for name, path in munge.items()))  # fmt: skip
            wait_until(munge["socket"].exists, _START_SECONDS, "munged")
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            wait_until(self._all_idle, _START_SECONDS, "two idle nodes")
        except BaseException as error:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in folder.glob("*.out"))
            self.__exit__()
            raise RuntimeError(f"SLURM did not start\n{logs}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
            run("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: not run("squeue", "--noheader"), 120, "an empty queue")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(60)
        if self._former is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = self._former

    def start_node(self, node: str) -> None:
        """Start a node's daemon, for the first time or after ``lose_node``."""
        self._start("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """End a node as a cut of its power does: its daemon, its steps and their processes, with SIGKILL."""
        processes = {p.pid: p for p in psutil.process_iter()}
        doomed = []
        for process in processes.values():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                conf = environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
                if conf and environment.get("SLURMD_NODENAME") == node:
                    doomed += [process, *(p for p in process.parents() if p.name() == "slurmstepd")]
                elif process.name() == "slurmd" and process.cmdline()[-1] == node and conf:
                    doomed.insert(0, process)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _start(self, name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None
        with open(self._folder / f"{name}-{len(self._daemons)}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen([program, *arguments], stdout=out, stderr=subprocess.STDOUT)
            )

    def _all_idle(self) -> bool:
        assert all(daemon.poll() is None for daemon in self._daemons), "a daemon has ended"
        with contextlib.suppress(subprocess.SubprocessError):
            return run("sinfo", "--noheader", "--format=%D %t") == f"{len(NODES)} idle"
        return False


def run(*command: str) -> str:
    """What a SLURM command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def job_states(number: str) -> Iterator[dict[str, str]]:
    """The fields that ``scontrol show job`` knows of a job, or of each task of an array."""
    for line in run("scontrol", "show", "job", "--oneliner", number).splitlines():
        yield dict(field.split("=", 1) for field in line.split() if "=" in field)


def wait_until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {seconds:g} s")
        time.sleep(0.2)  # most ask by a program of SLURM, which takes time off what they wait for
