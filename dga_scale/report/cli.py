"""The command ``dga-report``; tools/report.py calls the same function."""

import argparse
from pathlib import Path
from typing import NoReturn

from dga_scale.config.arguments import Parser
from dga_scale.errors import run_main


def report_command() -> NoReturn:
    """Run ``dga-report``: write one HTML page about one run or several."""
    parser = Parser(
        prog="dga-report", description="One self-contained HTML page about one run, or several side by side."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="Folder of a run (--output_dir).")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="Default: report.html.")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="Folder for the figures as PNG files. Default: none."
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="Folder that tools/evaluate.py wrote (--output_dir): adds its scores. Default: none.",
    )
    run_main(lambda: parser.run(_report))


def _report(options: argparse.Namespace) -> int:
    from dga_scale.report.report import write_report

    write_report(options.runs, options.output, options.figures, options.evaluation)
    print(f"report: {options.output}")
    return 0
