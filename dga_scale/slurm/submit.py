"""Submit scripts through ``sbatch``, each job after the one before."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dga_scale.errors import UserError
from dga_scale.slurm.render import job_name, render
from dga_scale.slurm.stages import Job


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: Job
    number: str
    log: str
    """The path of its output; for an array the pattern of the tasks' paths."""
    script: Path


def submit(jobs: Sequence[Job]) -> list[Submitted]:
    """Submit a chain: a job starts when the one before has succeeded, and is removed where that has failed.

    Raises:
        UserError: There is no ``sbatch``, or SLURM refuses a job. No job was submitted then, unless SLURM
            refuses one that passed its own ``--test-only``.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine: dga-submit runs on a login node of a SLURM cluster. "
            "--dry_run prints the scripts anywhere"
        )
    scripts = [render(job) for job in jobs]
    for job, script in zip(jobs, scripts, strict=True):
        _sbatch(["--test-only"], script, f"{job.stage}: SLURM would not run this job")
    done: list[Submitted] = []
    for job, script in zip(jobs, scripts, strict=True):
        logs = Path(job.options.logs)
        try:
            logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it, and the job would fail
        except OSError as error:
            raise UserError(f"--logs {logs}: {error.strerror}. Give a folder that you can write") from None
        after = dependency(done[-1].number) if done else []
        earlier = f" (submitted already: {', '.join(each.number for each in done)})" if done else ""
        number = _sbatch(["--parsable", *after], script, f"{job.stage}: not submitted{earlier}")
        number = number.partition(";")[0]  # a cluster's name may follow
        stem = f"{job_name(job)}-{number}"
        path = logs / f"{stem}.sbatch"
        path.write_text(script, encoding="utf-8")
        log = f"{stem}_*.log" if job.options.array() else f"{stem}.log"
        done.append(Submitted(job, number, f"{job.options.logs}/{log}", path))
    return done


def dependency(number: str) -> list[str]:
    """Return the options of ``sbatch`` for a job that waits for another one."""
    return [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]


def _sbatch(options: list[str], script: str, failure: str) -> str:
    result = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line.removeprefix("sbatch: error: ") for line in result.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{failure}. SLURM says: {'; '.join(lines)}. `sinfo` shows what there is, "
            "`sacctmgr show associations user=$USER` which accounts you may use"
        )
    return result.stdout.strip()
