"""Check the programs of a chain before anything is submitted: flags, paths, batch sizes.

A path may also be one that an earlier job of the chain will write.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dga_scale.config.comparison import corpora_of, given_paths
from dga_scale.corpus.loading.mixture import parse_mix
from dga_scale.corpus.shards import read_manifest
from dga_scale.errors import UserError, naming_flags
from dga_scale.slurm.options import JobOptions

TASK = '"$SLURM_ARRAY_TASK_ID"'


@dataclass(frozen=True)
class Job:
    """One job, ready to be rendered."""

    stage: str
    options: JobOptions
    command: tuple[str, ...]
    """The program and its arguments, each quoted for the shell."""
    writes: str
    """The folder that the job writes and later jobs may read."""
    run: str = ""
    """The run's folder, quoted for the shell; for ``train`` only."""


class AvailableFolders:
    """The folders that exist now or will exist when the earlier jobs have ended."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._written = {Path(job.writes).resolve() for job in jobs}

    def is_written(self, path: str) -> bool:
        """Return whether an earlier job of the chain writes this path."""
        resolved = Path(path).resolve()
        return any(folder in self._written for folder in (resolved, *resolved.parents))

    def exists(self, path: str) -> bool:
        """Return whether the folder exists now or when the earlier jobs have ended."""
        return os.path.isdir(path) or self.is_written(path)

    def check_model(self, name: str) -> None:
        """Refuse the path of a missing folder; names on the hub can't be checked here.

        Raises:
            UserError: ``name`` is neither an available folder nor a possible name on the hub.
        """
        if not self.exists(name) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise UserError("no such folder, and no name on the Hugging Face hub. Give one of the two", name)


def make_job(stage: str, options: JobOptions, arguments: Sequence[str], before: Sequence[Job]) -> Job:
    """Check the arguments of a stage's program, and return its job.

    Args:
        stage: The stage: "shard", "train" or "evaluate".
        options: The options of the job.
        arguments: The arguments of ``dga-shard``, ``dga-train`` or ``dga-evaluate``.
        before: The earlier jobs of the chain.

    Raises:
        UserError: The program itself would refuse the arguments, as far as that is known before it runs.
    """
    return _CHECKS[stage](options, list(arguments), AvailableFolders(before))


def _shard(options: JobOptions, arguments: list[str], available: AvailableFolders) -> Job:
    from dga_scale.corpus.options import build_parser
    from dga_scale.corpus.reading.finding import find_sources

    parser = build_parser()
    found = parser.parse_args(arguments)
    if found.array_task is not None:
        raise UserError("--array_task: the job array sets it for each task. Give --array_tasks N instead")
    with naming_flags(parser.paths(found)):
        find_sources(found.inputs)
        for file in getattr(found, "exclude", ()):
            if not os.path.isfile(file):
                raise UserError("no such file. Give JSON lines with a text in each", file)
        available.check_model(found.tokenizer)
    command = [*map(shlex.quote, ["dga-shard", *arguments])]
    if options.cpus_per_task and not _given("num_workers", arguments):
        command.append(f"--num_workers={options.cpus_per_task}")
    if options.array_tasks > 1:
        command.append(f"--array_task={TASK}/{options.array_tasks}")
    return Job("shard", options, tuple(command), str(found.output))


def _train(options: JobOptions, arguments: list[str], available: AvailableFolders) -> Job:
    from dga_scale.config.parsing import read_config, without_flag

    job_flags = [field.name for field in fields(JobOptions)]
    config = read_config(arguments, job_flags)  # before torch is imported, which takes seconds
    import torch

    from dga_scale.run_folder import RunFolder
    from dga_scale.train.inputs import default_output_dir, makes_several_runs
    from dga_scale.zero.ds_config import resolve_ds_config
    from dga_scale.zero.ds_keys import load_ds_config

    if options.seeds and "seed" in config.explicit:
        raise UserError(f"--seed {config.run.seed} and --seeds {options.seeds}: leave --seed out")
    raw = load_ds_config(config.run.ds_config or "")
    # The sizes of ZeRO's buckets depend on the hidden size; no check does.
    resolved = resolve_ds_config(
        raw, config, world_size=options.world_size, hidden_size=64, device=torch.device("meta")
    )
    for spec in config.data.mix or ():
        parse_mix(spec)
    with naming_flags(given_paths(config)):
        if config.model.model is not None:
            available.check_model(config.model.model)
        for folder in corpora_of(config):
            if not available.is_written(folder):
                read_manifest(Path(folder))
    output = config.run.output_dir or default_output_dir(config)
    run_folder = shlex.quote(output)
    runs = [resolved.config.replace(output_dir=output)]
    if options.seeds:
        run_folder += f"/seed-{TASK}"
        arguments = without_flag("output_dir", arguments)
        runs = [runs[0].replace(seed=n, output_dir=f"{output}/seed-{n}") for n in options.seed_numbers()]
    if config.data.corpus and not makes_several_runs(config):
        for run in runs:
            RunFolder(Path(run.run.output_dir or "")).check(run)
    command = [*map(shlex.quote, ["dga-train", *arguments])]
    if options.seeds:
        command += [f"--seed={TASK}", f"--output_dir={run_folder}"]
    return Job("train", options, tuple(command), output, run_folder)


def _evaluate(options: JobOptions, arguments: list[str], available: AvailableFolders) -> Job:
    from dga_scale.endtasks.evaluate import parse_models
    from dga_scale.endtasks.evaluate_cli import build_parser
    from dga_scale.endtasks.suite import load_suite

    parser = build_parser()
    found = parser.parse_args(arguments)
    with naming_flags(parser.paths(found)):
        available.check_model(found.base)
        for model in parse_models(found.model):
            for folder in model.folders:
                available.check_model(folder)
        load_suite(found.suite, available.exists)
    command = map(shlex.quote, ["dga-evaluate", *arguments])
    return Job("evaluate", options, tuple(command), str(found.output_dir))


_CHECKS: dict[str, Callable[[JobOptions, list[str], AvailableFolders], Job]] = {
    "shard": _shard,
    "train": _train,
    "evaluate": _evaluate,
}


def _given(name: str, arguments: Sequence[str]) -> bool:
    return any(argument.split("=", 1)[0] == f"--{name}" for argument in arguments)
