"""The command ``dga-evaluate``; tools/evaluate.py calls the same function."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.arguments import Parser, PathText
from dga_scale.endtasks.suite import load_suite
from dga_scale.errors import naming_flags, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.storage.lock import owned


def evaluate_command() -> NoReturn:
    """Entry point of ``dga-evaluate``."""
    run_main(main)


def build_parser() -> Parser:
    """Build the parser of the command's options."""
    parser = Parser(
        prog="dga-evaluate",
        description="What adaptation gained in the domain and cost outside it: held-out loss and end tasks "
        "of models against the base that they were adapted from, with intervals and paired tests. A stopped "
        "command resumes.",
    )
    add = parser.add_argument
    add("--base", required=True, type=PathText, metavar="DIR",
        help="the model that was adapted: folder or hub name")  # fmt: skip
    add(
        "--model",
        required=True,
        nargs="+",
        type=PathText,
        metavar="[LABEL=]DIR",
        help="adapted models; those of one LABEL differ by their training seed, and are averaged",
    )
    add(
        "--suite",
        required=True,
        type=Path,
        metavar="YAML",
        help="corpora, end tasks, seeds and settings: see launchers/suites/acl.yaml",
    )
    add(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="results.json, trade_off.png and the scores of single seeds go here",
    )
    parser.add_import()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate models on a suite, and print all figures against the base's."""
    quiet_libraries()
    return build_parser().run(_evaluate, arguments)


def _evaluate(options: argparse.Namespace) -> int:
    suite = load_suite(options.suite)
    from dga_scale.endtasks.evaluate import evaluate, parse_models  # transformers' import takes seconds
    from dga_scale.logging.plots import comparison_figure, save_png
    from dga_scale.report.scores import RESULTS, trade_off

    with owned(options.output_dir):
        with naming_flags(suite.given_paths(options.suite)):
            result = evaluate(options.base, parse_models(options.model), suite, options.output_dir)
        _print(result)
        written = [options.output_dir / RESULTS]
        if points := trade_off(result):
            written.append(options.output_dir / "trade_off.png")
            save_png(comparison_figure(points), written[-1])
    print(f"results: {', '.join(map(str, written))}")
    return 0


def _print(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from dga_scale.report.scores import COLUMNS, remarks, score_sections

    table = Table(title=f"against {result['base']}")
    for column in ("", *COLUMNS):
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    for title, rows in score_sections(result["models"]):
        for number, row in enumerate(rows):
            table.add_row("" if number else title, *row.cells)
        table.add_section()
    console = Console()
    # In a pipe rich would wrap at 80 columns and cut numbers.
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for remark in remarks(result):
        print(remark)
