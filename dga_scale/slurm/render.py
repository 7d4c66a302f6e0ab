"""Render a job as a batch script that people can read and edit too."""

import shlex
from pathlib import Path

from dga_scale.slurm.options import JobOptions
from dga_scale.slurm.stages import Job


def render(job: Job) -> str:
    """Render the batch script of a checked job; it runs in the folder in which ``sbatch`` is called."""
    options = job.options
    # The site's modules often fail under `set -u`: they are loaded before it.
    lines = ["#!/bin/bash", *(f"#SBATCH --{line}" for line in _directives(job)), "", *options.setup]
    lines.append("set -euo pipefail")
    if options.container is None:
        programs = Path(options.venv) / "bin"
        here = "" if programs.is_absolute() else '"$PWD"/'
        lines.append(f"export PATH={here}{shlex.quote(str(programs))}:$PATH")
    lines.append('export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"')
    return "\n".join([*lines, *(_training(job) if job.stage == "train" else _simple(job))]) + "\n"


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
    # A requeued job appends to its log.
    lines += ["open-mode=append", "requeue"]
    if job.stage == "train":
        lines.append(f"signal=USR1@{round(options.stop_minutes * 60)}")
    return lines + list(options.sbatch)


def job_name(job: Job) -> str:
    """Return the job's name in the queue and in the names of its files."""
    return job.options.job_name or f"dga-{job.stage}"


def _simple(job: Job) -> list[str]:
    return ["", *_step(job, "srun --mpi=none --ntasks=1", "")]


def _training(job: Job) -> list[str]:
    # --kill-on-bad-exit would kill rank 0 while it prints its last lines, because rank 1 has exited with 75.
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
        "# rank was lost, perhaps with its node. The job is then requeued if this turn saved a checkpoint.",
        "if [[ $code == 75 || $code == 138 ]]; then",
        '    again="stopped on a signal"',
        'elif [[ $code == 76 || $code -ge 128 ]] && [[ $(saved) != "$before" ]]; then',
        '    again="a rank was lost"',
        "else",
        '    exit "$code"',
        "fi",
        'echo "$again: requeued, the next turn resumes from the newest checkpoint"',
        'scontrol requeue "$SLURM_JOB_ID" || echo "SLURM refused to requeue: submit the same job to resume"',
        'exit "$code"',
    ]


def _step(job: Job, srun: str, end: str) -> list[str]:
    """Write the ``srun`` command of a program, one setting a line."""
    options = job.options
    # Since SLURM 22.05 srun does not inherit this from the job.
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
    """Return the words between srun and the program, for either kind of container."""
    image = shlex.quote(options.container or "")
    folders = ['"$PWD"', *(shlex.quote(str(Path(folder).resolve())) for folder in options.mounts)]
    if (options.container or "").endswith(".sif"):
        gpus = "--nv " if options.gpus else ""
        return [f'apptainer exec {gpus}--pwd "$PWD" --bind {",".join(folders)} {image}']
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f'--container-image={image} --container-workdir="$PWD" --container-mounts={mounts}']
