"""Run jobs one after the other, record which are finished, and stop on a signal."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import ROOT
from benchmarks.experiments.paper_tables.jobs import Job
from benchmarks.experiments.paper_tables.settings import label
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.run_folder import write_text


class Runner:
    """Runs commands, each in a process group of its own; a signal to this process is forwarded and ends all.

    The running command holds the folder's lock too: if this process is killed, the command that survives is
    not started a second time. ``jobs.json`` in the folder has command and inputs of each finished job.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.file = output, output / "jobs.json"
        output.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text() if self.file.exists() else "{}"
        self._done: dict[str, dict[str, Any]] = json.loads(text)
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

    def finished(self, job: Job) -> bool:
        """Return whether the job need not be run.

        Raises:
            UserError: the job was finished by another command, with another result.
        """
        done = self._done.get(job.name)
        if done is None or done == _record(job) or job.extends:
            return done == _record(job)
        differing = [pair for pair in zip(done["command"], job.command, strict=False) if pair[0] != pair[1]]
        then, now = differing[0] if differing else (f"{len(done['command'])} words", len(job.command))
        raise UserError(
            f"{self.file}: {job.name} was finished by another command: {then} then, {now} now. Give another "
            "--output_dir; or remove its folder and its entry in that file."
        )

    def run(self, job: Job) -> bool:
        """Run a job, and return False if it was stopped.

        Raises:
            UserError: the job failed; the message has the end of its log.
        """
        if self._stopped:
            return False
        log = self.output / "logs" / f"{label(job.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # This Python's programs come first, and this repository's code.
        first = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
        paths = {n: os.pathsep.join(filter(None, (own, os.environ.get(n)))) for n, own in first.items()}
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env={**os.environ, **paths},
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
        self._done[job.name] = _record(job)
        write_text(self.file, json.dumps(self._done, indent=1) + "\n")
        return True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        print("stopping: the running job saves its state", flush=True)
        self._forward(number)

    def _forward(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def _record(job: Job) -> dict[str, Any]:
    return {"command": list(job.command), "inputs": job.inputs}
