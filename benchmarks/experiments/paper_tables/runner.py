"""Run jobs one after the other, record which are finished, and stop on a signal."""

import fcntl
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import ROOT
from benchmarks.experiments.paper_tables.jobs import Job
from benchmarks.experiments.paper_tables.settings import label
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.run_folder import write_text


class Ledger:
    """The file of the finished jobs, with command and seconds of each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def finished(self, job: Job) -> bool:
        """Return whether the job need not be run.

        Raises:
            UserError: the job was finished by another command, with another result.
        """
        entry = self.entries.get(job.name)
        if entry is None:
            return False
        if entry["digest"] == _digest(job):
            return True
        if job.extends:
            return False
        raise UserError(
            f"{self.file}: {job.name} was finished by another command: "
            f"{_difference(entry['command'], job)}. Give another --output_dir; or remove its folder and "
            "its entry in that file."
        )

    def add(self, job: Job, seconds: float) -> None:
        """Record a finished job."""
        entry = {"kind": job.kind, "seconds": round(seconds, 1), "digest": _digest(job)}
        self.entries[job.name] = {**entry, "command": list(job.command)}
        write_text(self.file, json.dumps(self.entries, indent=1) + "\n")

    def seconds_left(self, jobs: Sequence[Job]) -> tuple[float, int]:
        """Estimate the time of jobs by finished ones of their kind, and count those without any."""
        known: dict[str, list[float]] = {}
        for entry in self.entries.values():
            for kind in {entry["kind"], entry["kind"].split()[0]}:
                known.setdefault(kind, []).append(entry["seconds"])
        total, unknown = 0.0, 0
        for job in jobs:
            found = known.get(job.kind) or known.get(job.kind.split()[0])
            total += statistics.mean(found) if found else 0
            unknown += not found
        return total, unknown


class Runner:
    """Runs commands, each in a process group of its own; a signal to this process is forwarded and ends all.

    The running command holds the folder's lock too: if this process is killed, the command that survives is
    not started a second time.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(output / "jobs.json")
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> "Runner":
        self._lock = open(self.output / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"{self.output}: another comparison, or a command that it left running, uses this folder. "
                "Wait for it, or end it."
            ) from None
        self._former = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._lock.close()

    def run(self, job: Job, environment: Mapping[str, str]) -> bool:
        """Run a job, and return False if it was stopped.

        Raises:
            UserError: the job failed; the message has the end of its log.
        """
        if self._stopped:
            return False
        log = self.output / "logs" / f"{label(job.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
            if self._stopped:  # while it started
                self._forward(signal.SIGTERM)
            code = self._process.wait()
        if self._stopped or code == EXIT_STOPPED:
            return False
        if code != 0:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"{job.name} ended with code {code}; {log} ends on:\n{last}")
        self.ledger.add(job, time.monotonic() - started)
        return True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        print("stopping: the running job saves its state", flush=True)
        self._forward(number)

    def _forward(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def environment() -> dict[str, str]:
    """Return the environment for jobs: this Python's programs come first, and this repository's code."""
    paths = {"PATH": [str(Path(sys.executable).parent)], "PYTHONPATH": [str(ROOT)]}
    return {
        **os.environ,
        **{
            name: os.pathsep.join([*own, *filter(None, [os.environ.get(name)])])
            for name, own in paths.items()
        },
    }


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps([job.command, job.inputs]).encode()).hexdigest()[:16]


def _difference(former: Sequence[str], job: Job) -> str:
    """Describe the first word in which the two commands differ."""
    for before, now in zip(former, job.command, strict=False):
        if before != now:
            return f"{before} then, {now} now"
    return f"{len(former)} words then, {len(job.command)} now"
