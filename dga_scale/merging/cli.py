"""The command ``dga-merge``; tools/merge_models.py calls the same function."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.arguments import Parser
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.merging.settings import METHODS, MergeSettings


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
    add("--base", required=True, metavar="DIR", help="the model that was adapted: folder or hub name")
    add(
        "--model",
        required=True,
        nargs="+",
        metavar="DIR",
        help="adapted from it; linear and ties take several",
    )
    add("--method", choices=METHODS, default="linear", help="formula; default: linear")
    add("--weight", type=float, default=0.5, help="0: the base, 1: the adapted model; default: 0.5")
    add("--density", type=float, default=0.2, help="ties: share of each update that is kept; default: 0.2")
    add("--output", type=Path, metavar="DIR", help="new folder for the merged model")
    add("--sweep", type=_numbers, metavar="W,W,...", help="score these weights, such as 0,0.25,0.5,0.75,1; "
        "with --output a model of each is written, DIR/weight-0.25 and so on")  # fmt: skip
    add("--corpus", metavar="DIR", help="of --sweep: the domain's corpus; its held-out split is scored")
    add("--general_corpus", metavar="DIR", help="of --sweep: general text, the same")
    add("--results", type=Path, default=Path("merge_sweep"), metavar="DIR",
        help="of --sweep: where sweep.json and sweep.png go; default: merge_sweep")  # fmt: skip
    add("--batch_size", type=int, default=16, help="of --sweep: rows in one pass; default: 16")
    add("--max_eval_samples", type=int, default=2000, help="of --sweep: rows of each corpus; default: 2000")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge or sweep as given in ``arguments`` (None: the command line)."""
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    weights = options.sweep or [options.weight]
    settings = [MergeSettings(options.method, weight, options.density) for weight in weights]
    if not options.sweep and options.output is None:
        raise UserError("--output is missing. Give a new folder for the merged model, or --sweep to compare.")
    if options.sweep and not (options.corpus and options.general_corpus):
        raise UserError("--sweep needs --corpus (the domain's) and --general_corpus.")
    for name in ("batch_size", "max_eval_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1.")
    if options.output is not None and options.output.exists():
        raise UserError(f"--output {options.output} exists already. Give a new folder, or remove it.")
    from dga_scale.merging.folders import ModelFolder  # transformers' import takes seconds
    from dga_scale.merging.merge import Merge

    models = [ModelFolder.open(name) for name in options.model]
    merge = Merge(ModelFolder.open(options.base), models, options.method)
    if options.sweep:
        _sweep(merge, settings, options)
        if options.output is not None:
            options.output.mkdir(parents=True)
            for each in settings:
                merge.write(each, options.output / f"weight-{each.weight:g}")
    else:
        merge.write(settings[0], options.output)
    if options.output is not None:
        print(f"merged: {options.output}")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0,0.25,0.5,0.75,1"
        ) from None


def _sweep(merge: Any, settings: Sequence[MergeSettings], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from dga_scale.evaluation.held_out import open_held_out
    from dga_scale.logging.plots import save_png, trade_off_figure
    from dga_scale.merging.sweep import sweep
    from dga_scale.run_folder import write_text

    corpora = {
        "domain": open_held_out(options.corpus, "--corpus", merge.base.tokenizer),
        "general": open_held_out(options.general_corpus, "--general_corpus", merge.base.tokenizer),
    }
    found = sweep(merge, settings, corpora, batch_size=options.batch_size, max_rows=options.max_eval_samples)
    points = []
    for point in found:
        points.append(point)
        print(f"weight {point['weight']:g}: domain loss {point['domain_loss']:.4f}, "
              f"general loss {point['general_loss']:.4f}", flush=True)  # fmt: skip
    table = Table(title=f"{options.method}: 0 is {options.base}, 1 is {', '.join(options.model)}")
    for column in ("weight", "domain loss", "domain accuracy", "general loss", "general accuracy"):
        table.add_column(column, justify="right")
    for point in points:
        names = ("domain_loss", "domain_accuracy", "general_loss", "general_accuracy")
        table.add_row(f"{point['weight']:g}", *(f"{point[name]:.4f}" for name in names))
    Console().print(table)
    options.results.mkdir(parents=True, exist_ok=True)
    content = {
        "base": options.base,
        "models": options.model,
        "method": options.method,
        "density": options.density if options.method == "ties" else None,
        "corpora": {
            name: {"path": str(c.path), "content_hash": c.content_hash} for name, c in corpora.items()
        },
        "max_eval_samples": options.max_eval_samples,
        "points": points,
    }
    write_text(options.results / "sweep.json", json.dumps(content, indent=2) + "\n")
    path = [(f"{p['weight']:g}", p["domain_loss"], p["general_loss"]) for p in points]
    save_png(trade_off_figure({options.method: path}), options.results / "sweep.png")
    print(f"results: {options.results / 'sweep.json'}, {options.results / 'sweep.png'}")
