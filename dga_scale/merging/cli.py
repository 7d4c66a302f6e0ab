"""The command ``dga-merge``; tools/merge_models.py calls the same function."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from dga_scale.config.arguments import Count, Parser, PathText, number
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.merging.settings import METHODS, MergeSettings
from dga_scale.storage.lock import owned_output


def merge_command() -> NoReturn:
    """Entry point of ``dga-merge``."""
    run_main(main)


def build_parser() -> Parser:
    """Build the parser of the command's options."""
    parser = Parser(
        prog="dga-merge",
        description="Merge adapted models with the base that they were adapted from: often most of the "
        "domain's gain at a fraction of what it costs outside. --sweep shows which coefficient is worth it.",
    )
    add = parser.add_argument
    add("--base", required=True, type=PathText, metavar="DIR",
        help="the model that was adapted: folder or hub name")  # fmt: skip
    add("--model", required=True, nargs="+", type=PathText, metavar="DIR",
        help="adapted from it; linear and ties take several")  # fmt: skip
    add("--method", choices=METHODS, default="linear", help="formula; default: linear")
    add("--weight", type=float, default=0.5, help="0: the base, 1: the adapted model; default: 0.5")
    add("--density", type=float, default=0.2,
        help="ties: share of each tensor's update that is kept, the largest; default: 0.2")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="new folder for the merged model")
    add("--sweep", type=_numbers, metavar="W,W,...", help="score these weights, such as 0,0.25,0.5,0.75,1; "
        "with --output a model of each is written, DIR/weight-0.25 and so on")  # fmt: skip
    add("--corpus", type=PathText, metavar="DIR",
        help="of --sweep: the domain's corpus; its held-out split is scored")  # fmt: skip
    add("--general_corpus", type=PathText, metavar="DIR", help="of --sweep: general text, the same")
    add("--results", type=Path, default=Path("merge_sweep"), metavar="DIR",
        help="of --sweep: where sweep.json and sweep.png go; default: merge_sweep")  # fmt: skip
    add("--batch_size", action=Count, default=16, help="of --sweep: rows in one pass; default: 16")
    add("--max_eval_samples", action=Count, default=2000,
        help="of --sweep: rows of each corpus; default: 2000")  # fmt: skip
    parser.add_import()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge or sweep as given in ``arguments`` (None: the command line)."""
    quiet_libraries()
    return build_parser().run(_merge, arguments)


def _merge(options: argparse.Namespace) -> int:
    weights = options.sweep or [options.weight]
    settings = [MergeSettings(options.method, weight, options.density) for weight in weights]
    if not options.sweep and options.output is None:
        raise UserError("--output is missing. Give a new folder for the merged model, or --sweep to compare.")
    if options.sweep and not (options.corpus and options.general_corpus):
        raise UserError("--sweep needs --corpus (the domain's) and --general_corpus.")
    if options.output is not None and options.output.exists():
        raise UserError("it exists already. Give a new folder, or remove it.", options.output)
    from dga_scale.merging.folders import ModelFolder  # transformers' import takes seconds
    from dga_scale.merging.merge import Merge
    from dga_scale.run_folder import new_folder

    models = [ModelFolder.open(name) for name in options.model]
    merge = Merge(ModelFolder.open(options.base), models, options.method)
    with ExitStack() as held:
        for folder in (options.output, options.results if options.sweep else None):
            if folder is not None:
                held.enter_context(owned_output(folder))
        if options.sweep:
            from dga_scale.merging.sweep import report_sweep

            report_sweep(merge, settings, options)
            if options.output is not None:
                with new_folder(options.output) as folder:
                    for each in settings:
                        merge.write(each, folder / f"weight-{each.weight:g}")
        else:
            merge.write(settings[0], options.output)
    if options.output is not None:
        print(f"merged: {options.output}")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [number(each) for each in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0,0.25,0.5,0.75,1"
        ) from None
