"""A job as the text of a batch script, to be read and edited by people too."""

import shlex
from pathlib import Path

from dga_scale.slurm.options import JobOptions
from dga_scale.slurm.stages import Job


def render(job: Job) -> str:
    """The script of a job.

    Args:
        job: checked.

    Returns:
        text for ``sbatch``; it runs in the folder in which that is called.

    """
    options = job.options
    # Other people's modules seldom bear `set -u`: they come first.
    parts = ["#!/bin/bash", *(f"#SBATCH --{line}" for line in _directives(job)), "", *options.setup]
    parts.append("set -euo pipefail")
    if options.container is None:
        programs = Path(options.venv) / "bin"
        here = "" if programs.is_absolute() else '"$PWD"/'
        parts.append(f"export PATH={here}{shlex.quote(str(programs))}:$PATH")
    parts.append('export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"')
    return "\n".join([*parts, *(_training(job) if job.stage == "train" else _simple(job))]) + "\n"


def _directives(job: Job) -> list[str]:
    options, array = job.options, job.options.array()
    lines = [f"job-name={job_name(job)}", f"nodes={options.nodes}"]
    lines.append(f"ntasks-per-node={options.tasks_per_node if job.stage == 'train' else 1}")
    if options.gpus:
        lines.append(f"gres=gpu:{options.gpus_per_node}")
    optional = {
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        "array": array,
    }
    lines += [f"{name}={value}" for name, value in optional.items() if value is not None]
    log = f"{options.logs}/%x-{'%A_%a' if array else '%j'}.log"
    lines.append(f'output="{log}"' if shlex.quote(log) != log else f"output={log}")
    # A job that is put back into the queue adds to its log.
    lines += ["open-mode=append", "requeue"]
    if job.stage == "train":
        lines.append(f"signal=USR1@{round(options.stop_minutes * 60)}")
    return lines + list(options.sbatch)


def job_name(job: Job) -> str:
    """The job's name in the queue and in the names of its files."""
    return job.options.job_name or f"dga-{job.stage}"


def _simple(job: Job) -> list[str]:
    return ["", *_step(job, "srun --mpi=none --ntasks=1", "")]


def _training(job: Job) -> list[str]:
    # Not --kill-on-bad-exit: it would kill rank 0 in its last lines, because rank 1 has left with 75 already.
    return [
        "",
        f"run={job.run}",
        'saved() { cat "$run"/checkpoints/latest "$run"/*/checkpoints/latest 2>/dev/null || true; }',
        "before=$(saved)",
        "code=0",
        *_step(job, "srun --mpi=none --kill-on-bad-exit=0 --wait=60", " || code=$?"),
        "",
        "# Before the time limit SLURM sends SIGUSR1 to all ranks (--signal above): they save, stop after",
        "# the same step and exit with 75 (138: it came before the program had started). 76 and 128 up: a",
        "# rank was lost, with its node perhaps. The job goes on then if this turn has saved anything.",
        "if [[ $code == 75 || $code == 138 ]]; then",
        '    again="stopped on a signal"',
        'elif [[ $code == 76 || $code -ge 128 ]] && [[ $(saved) != "$before" ]]; then',
        '    again="a rank was lost"',
        "else",
        '    exit "$code"',
        "fi",
        'echo "$again: back into the queue, the next turn goes on from the newest checkpoint"',
        'scontrol requeue "$SLURM_JOB_ID" || echo "not taken back: submit the same job again to go on"',
        'exit "$code"',
    ]


def _step(job: Job, srun: str, end: str) -> list[str]:
    """The ``srun`` of a program, one setting a line."""
    options = job.options
    # Since SLURM 22.05 srun does not take this from the job.
    cpus = f" --cpus-per-task={options.cpus_per_task}" if options.cpus_per_task else ""
    lines = [srun + cpus]
    if options.container is not None:
        lines += _container(options)
    program, *arguments = job.command
    lines.append(program)
    for argument in arguments:
        if argument.startswith("--") or len(lines) == 1:
            lines.append(argument)
        else:
            lines[-1] += f" {argument}"
    return [*(f"{'    ' if number else ''}{line} \\" for number, line in enumerate(lines[:-1])),
            f"    {lines[-1]}{end}"]  # fmt: skip


def _container(options: JobOptions) -> list[str]:
    """What stands between srun and the program, for either kind of container."""
    image = shlex.quote(options.container or "")
    folders = ['"$PWD"', *(shlex.quote(str(Path(folder).resolve())) for folder in options.mounts)]
    if (options.container or "").endswith(".sif"):
        gpus = "--nv " if options.gpus else ""
        return [f'apptainer exec {gpus}--pwd "$PWD" --bind {",".join(folders)} {image}']
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f'--container-image={image} --container-workdir="$PWD" --container-mounts={mounts}']
