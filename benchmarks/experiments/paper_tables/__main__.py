"""Run DGA's comparison of methods over domains, and DAS's sequence of domains, at the scale of a YAML file.

    python -m benchmarks.experiments.paper_tables CONFIG.yaml --data DIR --output_dir DIR

It runs this project's own commands one after the other and records the finished ones, so the same command
resumes after a stop at any moment. DIR/tables.md is the comparison so far.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.paper_tables.jobs import Work
from benchmarks.experiments.paper_tables.settings import load_settings
from dga_scale.config.arguments import Parser
from dga_scale.errors import run_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs that are not finished, and write the tables."""
    parser = Parser(
        prog="python -m benchmarks.experiments.paper_tables",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.yaml", help="see benchmarks/experiments/paper_tables/*.yaml")
    add("--data", default=".", metavar="DIR", help="replaces {data} in the YAML; default: current folder")
    add("--output_dir", type=Path, metavar="DIR", help="corpora, runs, scores and tables.md go here")
    add("--plan", action="store_true", help="only print what it all costs, on the YAML's plan: machines")
    options = parser.parse_args(arguments)
    settings = load_settings(options.config, os.path.abspath(options.data))
    if options.plan:
        from benchmarks.experiments.paper_tables.cost import print_cost  # whose imports take seconds

        return print_cost(settings)
    if options.output_dir is None:
        parser.error("--output_dir is missing")
    return run(Work(settings, options.output_dir.resolve()))


def run(work: Work) -> int:
    """Run all jobs that are not finished, and return the exit code: 75 if stopped."""
    from benchmarks.experiments.paper_tables.runner import Runner  # with torch
    from benchmarks.experiments.paper_tables.tables import write_tables
    from dga_scale.launch.preemption import EXIT_STOPPED

    jobs = list(work.jobs())
    with Runner(work.output) as runner:
        left = [job for job in jobs if not runner.finished(job)]
        for number, job in enumerate(left, len(jobs) - len(left) + 1):
            print(f"{number} of {len(jobs)}: {job.name}", flush=True)
            job.prepare()
            if not runner.run(job):
                print(f"stopped in {job.name}; the same command resumes")
                return EXIT_STOPPED
            write_tables(work)
    print(f"tables: {write_tables(work)}")
    return 0


if __name__ == "__main__":
    run_main(main)
