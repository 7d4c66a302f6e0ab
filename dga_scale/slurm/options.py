"""The options of a job: the resources it requests from SLURM, and the environment of its programs."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dga_scale.config.arguments import Parser
from dga_scale.errors import UserError

STAGES = ("shard", "train", "evaluate")

# Digits are those of ASCII, and no more of them than SLURM takes.
_GPUS = re.compile(r"(?:([\w.-]+):)?(\d{1,4})", re.ASCII)
_TASKS = r"\d{1,7}(?:-\d{1,7}(?::[1-9]\d{0,6})?)?"
_ARRAY = re.compile(rf"{_TASKS}(?:,{_TASKS})*(?:%[1-9]\d{{0,6}})?", re.ASCII)
_ITEM = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+)(?::(?P<step>\d+))?)?", re.ASCII)
_TIME = re.compile(
    r"(?:(?P<days>\d{1,5})-)?(?P<first>\d{1,7})(?::(?P<second>\d{1,7}))?(?::(?P<third>\d{1,7}))?", re.ASCII
)
_NAME = re.compile(r"[\w.,:@+-]+", re.ASCII)
_LARGEST_TASK = 4_000_000
"""The largest number of a task in SLURM's arrays, whatever a site's ``MaxArraySize``."""
_MOST_SEEDS = 1000
"""The most seeds of a job: the tasks of an array that SLURM takes where a site sets no other number."""


@dataclass(frozen=True)
class JobOptions:
    """The options of one job; None or an empty value stands for SLURM's or the site's default."""

    nodes: int = 1
    gpus_per_node: str | None = None
    """The GPUs of each node, as ``N`` or ``TYPE:N``."""
    cpus_per_task: int | None = None
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    job_name: str | None = None
    logs: str = "slurm"
    container: str | None = None
    mounts: tuple[str, ...] = ()
    venv: str = sys.prefix
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    seeds: str | None = None
    """The seeds to train with, written as SLURM writes the tasks of an array; for ``train`` only."""
    stop_minutes: float = 5.0
    """The minutes before the time limit at which the run saves and stops; for ``train`` only."""
    array_tasks: int = 1
    """The number of array tasks that share the work; for ``shard`` only."""

    @property
    def gpus(self) -> int:
        """The number of GPUs of each node."""
        found = _GPUS.fullmatch(self.gpus_per_node or "0")
        assert found
        return int(found[2])

    @property
    def tasks_per_node(self) -> int:
        """The number of processes on each node: one for each GPU, or one."""
        return max(1, self.gpus)

    @property
    def world_size(self) -> int:
        """The number of processes of the job."""
        return self.nodes * self.tasks_per_node

    def array(self) -> str | None:
        """Return the tasks of the job array as SLURM writes them; None where the job is not an array."""
        return self.seeds or (f"0-{self.array_tasks - 1}" if self.array_tasks > 1 else None)

    def seed_numbers(self) -> list[int]:
        """Return every seed in ``seeds``."""
        return [number for part in _ranges(self.seeds or "") for number in part]


def add_options(parser: Parser) -> None:
    """Add an option for each field of ``JobOptions``; options that are not given stay out of the result."""

    def add(name: str, help: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", help=help, **settings)

    add("nodes", "machines (default: 1); train only", type=int)
    add("gpus_per_node", "GPUs of each, and processes there; N or TYPE:N. Default: none, one process a node")
    add("cpus_per_task", "CPU cores of each process", type=int)
    add("time", "longest time, as SLURM writes it: 90 (minutes), 12:00:00, 2-00:00:00")
    add("account", "the account to charge")
    add("partition", "queue")
    add("qos", "quality of service")
    add("job_name", "default: dga-shard, dga-train, dga-evaluate")
    add("logs", "folder of the jobs' output and scripts (default: slurm)")
    add("container", "image to run in: FILE.sif through apptainer, anything else through Pyxis (srun "
        "--container-image); dga_scale has to be installed in it")  # fmt: skip
    add("mounts", "folder that the container sees besides the current one; may be repeated", action="append",
        metavar="DIR")  # fmt: skip
    add("venv", f"environment to run in (default: this one, {sys.prefix})")
    add("setup", "line of shell to run first, such as 'module load cuda'; may be repeated", action="append")
    add("sbatch", "further #SBATCH option without its dashes, such as constraint=a100; may be repeated",
        action="append", metavar="NAME=VALUE")  # fmt: skip
    add("seeds", "train only: a run for each, in OUTPUT_DIR/seed-N, as a job array: 1-5 or 1,2,7, 1-9%%3 for "
        "three at a time")  # fmt: skip
    add("stop_minutes", "train only: minutes before the time limit at which the run saves and stops, to "
        "resume in its next turn (default: 5); longer than a save takes", type=float)  # fmt: skip
    add("array_tasks", "shard only: tasks of the job array that share the work", type=int)


def make_options(stage: str, given: dict[str, Any]) -> JobOptions:
    """Check the options given for a stage, on their own and against each other.

    Raises:
        UserError: SLURM or the stage can't use a value.
    """
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    options = JobOptions(**values)
    _check_belonging(stage, values)
    rules: list[tuple[str, Callable[[Any], object], str]] = [
        ("nodes", lambda v: 1 <= v < 2**31, "must be at least 1, and below 2147483648"),
        ("cpus_per_task", lambda v: 1 <= v < 2**31, "must be at least 1, and below 2147483648"),
        ("array_tasks", lambda v: 1 <= v <= _LARGEST_TASK, f"must be from 1 to {_LARGEST_TASK}"),
        ("gpus_per_node", _GPUS.fullmatch, "write a number, or TYPE:NUMBER as in h100:4"),
        ("time", seconds, "write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"),
        ("seeds", _ARRAY.fullmatch, "write numbers and ranges, as in 1-5, 1,2,7 or 1-9%3"),
        ("seeds", _are_seeds,
         f"write ranges upwards, each seed once, at most {_MOST_SEEDS} of them, none above {_LARGEST_TASK}"),
        ("stop_minutes", lambda v: 1 <= v <= 1000, "must be from 1 to 1000"),
        *((name, _NAME.fullmatch, "letters, digits and .,:@+- only") for name in
          ("account", "partition", "qos", "job_name")),
        ("logs", lambda v: not set(v) & set('%"\\\n'), 'SLURM can\'t have %, " or \\ in the path of a log'),
        ("sbatch", lambda v: all(re.fullmatch(r"[a-z][^\n]*", line) for line in v),
         "write NAME=VALUE without dashes before it, one option each"),
    ]  # fmt: skip
    for name, holds, words in rules:
        if name in values and not holds(values[name]):
            value = " ".join(values[name]) if isinstance(values[name], tuple) else values[name]
            raise UserError(f"--{name} {value}: {words}")
    limit = seconds(options.time or "")
    if stage == "train" and limit is not None and options.stop_minutes * 60 >= limit:
        raise UserError(
            f"--stop_minutes {options.stop_minutes:g} is not before the end of --time {options.time}: the "
            "run would be stopped as it starts, over and over. Give it more time, or a smaller --stop_minutes"
        )
    _check_paths(options, "venv" in values)
    return options


def _ranges(seeds: str) -> list[range]:
    """Return the numbers that SLURM's notation of an array names, as ranges."""
    items = (_ITEM.fullmatch(item) for item in seeds.partition("%")[0].split(","))
    return [
        range(int(found["first"]), int(found["last"] or found["first"]) + 1, int(found["step"] or 1))
        for found in items
        if found
    ]


def _are_seeds(text: str) -> bool:
    """Return whether each range goes upwards, and all together are some numbers, each there once."""
    parts = _ranges(text)
    if not all(parts) or sum(map(len, parts)) > _MOST_SEEDS:
        return False
    numbers = [number for part in parts for number in part]
    return len(set(numbers)) == len(numbers) and max(numbers) <= _LARGEST_TASK


def _check_belonging(stage: str, values: dict[str, Any]) -> None:
    stage_of = {"nodes": "train", "seeds": "train", "stop_minutes": "train", "array_tasks": "shard"}
    for name, right_stage in stage_of.items():
        if name in values and stage != right_stage:
            instead = {"shard": "its processes are --array_tasks and --cpus_per_task", "train": "see --nodes",
                       "evaluate": "it is one process"}[stage]  # fmt: skip
            raise UserError(
                f"--{name} {values[name]}: {stage} does not take it ({instead}). Write it after "
                f"`{right_stage}`"
            )
    if "mounts" in values and "container" not in values:
        raise UserError(
            f"--mounts {' '.join(values['mounts'])} has an effect with --container only: leave it out"
        )
    if "venv" in values and "container" in values:
        raise UserError("--venv and --container: the programs come from one of the two. Leave one out")


def _check_paths(options: JobOptions, venv_given: bool) -> None:
    """Check that the job's folders and programs exist."""
    for folder in options.mounts:
        if not os.path.isdir(folder):
            raise UserError(f"--mounts {folder}: no such folder. Give one of this machine")
        if set(folder) & set(",:"):
            raise UserError(f"--mounts {folder}: a mounted path can't have commas or colons in it")
    image = options.container
    if image is not None:
        is_file = image.endswith((".sif", ".sqsh")) or image.startswith((".", "/"))
        if is_file and not Path(image).exists():
            raise UserError(f"--container {image}: no such file. Give an image of this machine")
    elif not (Path(options.venv) / "bin" / "dga-train").exists():
        where = f"--venv {options.venv}" if venv_given else f"this Python's environment {options.venv}"
        raise UserError(
            f"{where} has no bin/dga-train: dga_scale is not installed there. Install it, or give another "
            "environment, or an image with --container"
        )


def seconds(text: str) -> int | None:
    """Convert a time as SLURM writes it into seconds; None where the text is not a time.

    The forms are ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` and ``D-H:M:S``.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] is not None:
        return ((int(found["days"]) * 24 + first) * 60 + second) * 60 + third
    if found["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second
