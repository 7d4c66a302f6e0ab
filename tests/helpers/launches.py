"""Runs whose launcher is killed, and runs that are launched twice, on two ranks.

``benchmarks/launch_soak.py`` draws from here. "forked" is a launcher of our own, which forks ranks that have
everything imported: the kernel makes orphans of them as of any other's, and a launch costs a tenth.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dga_scale.checkpoint.store import newest_complete
from dga_scale.launch.launcher_watch import GRACE
from dga_scale.storage.safetensors_stream import record_of
from tests.helpers.forks import Launch, launch
from tests.helpers.kills import RANKS, Fault, Soak, assert_no_leftovers, logged, program
from tests.helpers.mpi import PROGRAMS
from tests.helpers.ranks import REPOSITORY, free_port, without_gloo

UNDISTURBED = Fault("time", None, 0.0)
"""Nobody sends its signal: the ranks are left alone."""
_REFUSAL = "is writing here, so this one"


@dataclass
class Killed:
    """A launcher that was killed."""

    launcher: str
    process: str
    """The one of its processes that was killed."""
    seconds_to_end: float
    """From its death to that of the last rank."""
    steps_again: int
    """Steps that had been printed and are not in the newest checkpoint."""
    refused: bool = False
    """Whether the same command, given at once, found the ranks still saving."""


class Started:
    """A launch under a real launcher, or under one of our own."""

    def __init__(self, launcher: str, flags: list[str], run: Path, log: Path) -> None:
        self.launcher, self.run, self._log = launcher, run, log
        self._forked: Launch | None = None
        if launcher == "forked":
            self._forked = launch(1, fork_ranks, RANKS, program, flags, run, UNDISTURBED)
            self.pid = self._forked.pids[0]
            return
        python = [sys.executable, "launchers/dga_train.py", *flags]
        command = {
            "deepspeed": ["deepspeed", f"--num_accelerators={RANKS}", f"--master_port={free_port()}"],
            "torchrun": ["torchrun", "--standalone", f"--nproc_per_node={RANKS}"],
            "mpirun": ["mpirun", "--bind-to", "none", "-n", str(RANKS)],
            "srun": ["srun", f"--ntasks={RANKS}", f"--nodes={RANKS}", "--mpi=none"],
        }[launcher] + (python[1:] if launcher in ("deepspeed", "torchrun") else python)
        settings = {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            **({"MASTER_ADDR": "127.0.0.1"} if launcher == "srun" else {}),
        }
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | settings, stdout=out, stderr=out
            )
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int | None:
        """Return the launcher's exit code, None where it runs on after so many seconds."""
        if self._forked is not None:
            return self._forked.codes[0] if self._forked.ended(timeout) else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def output(self) -> str:
        """Return what launcher and ranks have printed."""
        if self._forked is not None:
            return self._forked.output(0)
        return without_gloo(self._log.read_text(errors="replace"))

    def processes(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """Return the launcher's processes and those of the ranks."""
        top = psutil.Process(self.pid)
        below = top.children(recursive=True)
        if self.launcher == "srun":  # SLURM's daemons start them
            below = [p for p in psutil.process_iter() if str(self.run) in _command(p) and p.name() != "srun"]
            return list({a for p in below for a in p.parents() if a.name() == "slurmstepd"}), below
        own = [top, *(p for p in below if "deepspeed.launcher.launch" in _command(p))]
        return own, [p for p in below if p not in own]


def kills(soak: Soak, launcher: str, name: str, seconds: float, draws: random.Random) -> Iterator[Killed]:
    """One run, whose launcher is killed at random times of up to ``seconds`` until the run ends.

    The same command is given again at once, while the ranks may be there yet.

    Raises:
        AssertionError: Ranks live on, two write at once, or a loss, the final model or what is left in the
            folder is not as without kills.
    """
    run, number = soak.folder / name, 0

    def start() -> Started:
        nonlocal number
        number += 1
        return Started(launcher, soak.flags(run), run, soak.folder / f"{name}-{number}.log")

    current, killed = start(), list[Killed]()
    while True:
        code = current.wait(draws.uniform(0.0, seconds))
        if code is None:
            own, ranks = current.processes()
            if not own:  # srun, which waits for its step
                continue
            victim = draws.choice(own)
            process = victim.name()
            victim.kill()
            died, following = time.monotonic(), start()
            while left := [process for process in (*own, *ranks) if _lives(process)]:
                assert time.monotonic() < died + GRACE + 60.0, f"{name}: orphans {left}\n{current.output()}"
                time.sleep(0.02)
            seconds_to_end = time.monotonic() - died
            current.wait(60.0)
            found = logged(run)
            assert found == {step: soak.reference[step] for step in found}, f"{name}: other losses"
            checkpoint = newest_complete(run)
            saved = checkpoint.step if checkpoint else 0
            steps = [line.split("/")[0] for line in current.output().splitlines() if line.startswith("step ")]
            killed.append(
                Killed(launcher, process, seconds_to_end, sum(int(s.split()[1]) > saved for s in steps))
            )
            current = following
        elif _REFUSAL in current.output():
            assert killed, current.output()
            killed[-1].refused = True
            current = start()
        else:
            assert code == 0, f"{name} {launcher}: exit code {code}\n{current.output()}"
            break
    assert logged(run) == soak.reference
    assert record_of(run / "model" / "model.safetensors").sha256 == soak.model
    assert_no_leftovers(run)
    yield from killed


def twice(soak: Soak, name: str, draws: random.Random) -> bool:
    """Launch a run, and at a random time of it again; whether one of both was there when the other came.

    Raises:
        AssertionError: One was refused in other words than one line that names the other, or the run is not
            as one of a single launch.
    """
    run = soak.folder / name
    first = launch(RANKS, program, soak.flags(run), run, UNDISTURBED)
    began, pause = time.monotonic(), draws.uniform(0.0, 0.8 * soak.seconds)
    while (left := began + pause - time.monotonic()) > 0 and not first.ended(left):
        pass
    second = launch(RANKS, program, soak.flags(run), run, UNDISTURBED)
    codes = [each.wait(300.0)[0] for each in (first, second)]
    assert sorted(codes) in ([0, 0], [0, 2]), first.output(0) + second.output(0)
    if sorted(codes) == [0, 2]:
        owner, refused = (first, second) if codes == [0, 2] else (second, first)
        said = "".join(refused.output(rank) for rank in range(RANKS))
        assert said.count("error: ") == 1, said
        assert _REFUSAL in said, said
        assert any(f"process {pid} on " in said for pid in owner.pids), said
        assert "Traceback" not in said, said
    assert logged(run) == soak.reference
    assert record_of(run / "model" / "model.safetensors").sha256 == soak.model
    assert_no_leftovers(run)
    return sorted(codes) == [0, 2]


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


# --- in a launcher of our own ----------------------------------------------------------------------------


def fork_ranks(ranks: int, behave: Callable[..., int | None], *args: Any) -> int:
    """Be a launcher: fork ranks that call ``behave(*args)``, and wait for them; the largest exit code."""
    port = free_port()
    pids = [fork_rank(rank, ranks, port, behave, *args) for rank in range(ranks)]
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def fork_rank(rank: int, ranks: int, port: int, behave: Callable[..., int | None], *args: Any) -> int:
    """Fork a rank that calls ``behave(*args)``, and takes this process for its launcher; its pid."""
    if pid := os.fork():
        return pid
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="none", MASTER_PORT=str(port))
    code = 1
    try:
        code = behave(*args) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
