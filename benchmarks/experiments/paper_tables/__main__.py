"""DGA's comparison of methods over domains, and DAS's sequence of them, at the scale that a YAML says.

    python -m benchmarks.experiments.paper_tables CONFIG.yaml --data DIR --output_dir DIR

Runs this project's own commands one after the other; what is finished is kept, so the same command goes on
after a stop at any moment, over as many sittings as it takes. DIR/tables.md is the comparison so far.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.paper_tables.pieces import Work
from benchmarks.experiments.paper_tables.runner import Runner, environment
from benchmarks.experiments.paper_tables.settings import load_settings
from benchmarks.experiments.paper_tables.tables import write_tables
from dga_scale.config.arguments import Parser
from dga_scale.errors import run_main
from dga_scale.launch.preemption import EXIT_STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, and write the tables."""
    parser = Parser(
        prog="python -m benchmarks.experiments.paper_tables",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.yaml", help="see benchmarks/experiments/paper_tables/*.yaml")
    add("--data", default=".", metavar="DIR", help="takes the place of {data} in the YAML; default: here")
    add("--output_dir", type=Path, metavar="DIR", help="corpora, runs, scores and tables.md go here")
    add("--tables", action="store_true", help="only write the tables of what is finished")
    add("--plan", action="store_true", help="only print what it all costs, on the YAML's plan: machines")
    options = parser.parse_args(arguments)
    settings = load_settings(options.config, os.path.abspath(options.data))
    if options.plan:
        from benchmarks.experiments.paper_tables.cost import print_cost  # transformers' import takes seconds

        return print_cost(settings)
    if options.output_dir is None:
        parser.error("--output_dir is missing")
    work = Work(settings, options.output_dir.resolve())
    if options.tables:
        print(f"tables: {write_tables(work)}")
        return 0
    return run(work)


def run(work: Work) -> int:
    """All pieces that are not finished; 75 if stopped."""
    pieces = list(work.pieces())
    with Runner(work.output) as runner:
        left = [piece for piece in pieces if not runner.ledger.finished(piece)]
        while left:
            piece = left[0]
            seconds, unknown = runner.ledger.seconds_left(left)
            more = f" and {unknown} pieces of unknown length" if unknown else ""
            number = f"{len(pieces) - len(left) + 1} of {len(pieces)}"
            print(f"{number}: {piece.name}; left: {seconds / 60:.0f} min{more}", flush=True)
            piece.prepare()
            if not runner.run(piece, environment()):
                print(f"stopped in {piece.name}; the same command goes on")
                return EXIT_STOPPED
            left.pop(0)
            write_tables(work)
    print(f"tables: {write_tables(work)}")
    return 0


if __name__ == "__main__":
    run_main(main)
