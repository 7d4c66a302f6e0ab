"""The command ``dga-submit``; tools/submit.py calls the same function."""

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from dga_scale.config.arguments import Parser, nearest
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.slurm.options import STAGES, add_options, make_options
from dga_scale.slurm.render import render
from dga_scale.slurm.stages import Job, make_job
from dga_scale.slurm.submit import dependency, submit

THEN = "--then"


def submit_command() -> NoReturn:
    """Entry point of ``dga-submit``."""
    run_main(main, prints_result=True)


def build_parser() -> Parser:
    """Build the parser of the options for all jobs, the first stage, and the rest of the command line."""
    parser = Parser(
        prog="dga-submit",
        usage="dga-submit [options of all jobs] STAGE [options] [arguments] [--then STAGE ...]",
        description="Checks and submits SLURM jobs from a login node. STAGE is shard, train or evaluate, and "
        "takes the arguments of dga-shard, dga-train or dga-evaluate. Each job starts when the one before "
        "has succeeded. Options before the first STAGE hold for all jobs, those after a STAGE for it alone.",
        epilog="dga-submit --account abc shard my_text/ --tokenizer MODEL --output corpora/domain "
        "--array_tasks 8 --then train --nodes 2 --gpus_per_node 8 --time 12:00:00 --ds_config "
        "ds_configs/zero2.json --model MODEL --corpus corpora/domain --output_dir runs/mine",
        argument_default=argparse.SUPPRESS,
    )
    _add_all(parser)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_all(parser: Parser) -> None:
    add_options(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, print the scripts, submit nothing"
    )


def parse_chain(arguments: Sequence[str] | None = None) -> tuple[list[Job], bool]:
    """Read and check a command line.

    Returns:
        The jobs in their order, and whether they are only to be printed.

    Raises:
        UserError: An option or argument of a job is wrong; the message names the job's stage.
    """
    everything = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    first = list(takewhile(lambda word: word not in STAGES, everything))
    if len(first) == len(everything):  # no stage: before its flags are taken for those of all jobs
        for word in first:
            if not word.startswith("-") and (near := nearest(word, STAGES)):
                raise UserError(f"no stage {word}.{near}")
    parser.refuse_unknown_flags(first)
    parser.refuse_doubled_flags(first)
    shared = vars(parser.parse_known_args(everything)[0])  # a program's flags are left in ``rest``
    sections = [[shared.pop("stage")]]
    for word in shared.pop("rest"):
        if word == THEN:
            sections.append([])
        else:
            sections[-1].append(word)
    dry_run = shared.pop("dry_run", False)
    jobs: list[Job] = []
    for stage, *words in (section or [""] for section in sections):
        if stage not in STAGES:
            raise UserError(f"{THEN} {stage}: write one of {', '.join(STAGES)} after it")
        parser = Parser(prog="dga-submit", add_help=False, argument_default=argparse.SUPPRESS)
        _add_all(parser)
        parser.refuse_doubled_flags(words)
        own, program = parser.parse_known_args(words)
        given = shared | vars(own)
        dry_run = given.pop("dry_run", False) or dry_run
        try:
            jobs.append(make_job(stage, make_options(stage, given), program, jobs))
        except UserError as error:
            raise UserError(f"{stage}: {error}") from None
    return jobs, dry_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the jobs that ``arguments`` (None: the command line) describe, and submit or print them."""
    quiet_libraries()
    jobs, dry_run = parse_chain(arguments)
    if dry_run:
        for number, job in enumerate(jobs):
            after = " ".join(dependency(f"JOB_OF_{jobs[number - 1].stage.upper()}")) if number else ""
            print(f"# {job.stage}: sbatch {after}".rstrip())
            print(render(job))
        return 0
    submitted = submit(jobs)
    for number, each in enumerate(submitted):
        after = f", after {submitted[number - 1].number}" if number else ""
        print(f"{each.job.stage}: job {each.number}{after}; output {each.log}, script {each.script}")
    numbers = ",".join(each.number for each in submitted)
    print(f"watch: squeue --jobs {numbers}; end: scancel {numbers.replace(',', ' ')}")
    return 0
