"""The command ``dga-evaluate``; tools/evaluate.py calls the same function."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.arguments import Parser
from dga_scale.endtasks.suite import load_suite
from dga_scale.errors import run_main
from dga_scale.monitoring.quiet import quiet_libraries


def evaluate_command() -> NoReturn:
    """Entry point of ``dga-evaluate``."""
    run_main(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate models on a suite, and print all figures against the base's."""
    parser = Parser(
        prog="dga-evaluate",
        description="What adaptation gained in the domain and cost outside it: held-out loss and end tasks "
        "of models against the base that they were adapted from, with intervals and paired tests. Goes on "
        "where it was stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="the model that was adapted: folder or hub name")
    add(
        "--model",
        required=True,
        nargs="+",
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
    options = parser.parse_args(arguments)
    quiet_libraries()
    suite = load_suite(options.suite)
    from dga_scale.endtasks.evaluate import evaluate, parse_contenders  # transformers' import takes seconds
    from dga_scale.monitoring.plots import comparison_figure, save_png

    result = evaluate(options.base, parse_contenders(options.model), suite, options.output_dir)
    _print(result)
    written = [options.output_dir / "results.json"]
    points = [
        (label, model["domain_loss"]["values"], model["general_loss"]["values"])
        for label, model in result["models"].items()
        if "domain_loss" in model and "general_loss" in model
    ]
    if points:
        written.append(options.output_dir / "trade_off.png")
        save_png(comparison_figure(points), written[-1])
    print(f"results: {', '.join(map(str, written))}")
    return 0


def _print(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"against {result['base']}; 95% intervals")
    for column in ("", "model", "value", "interval", "n", "difference", "interval", "p (t)", "p (flips)"):
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    for section in _sections(result["models"]):
        for row in section:
            table.add_row(*row)
        table.add_section()
    console = Console()
    # Of a pipe rich would make lines of 80 columns, and cut numbers.
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for name, overlap in result["overlap"].items():
        print(f"overlap: {name}: {_overlap_line(overlap)}")
    for note in result["notes"]:
        print(f"note: {note}")


def _sections(models: Mapping[str, Any]) -> Iterator[list[tuple[str, ...]]]:
    """The table's rows, those of one corpus or task together."""
    base = next(iter(models.values()))
    for group, quantity in (("corpora", "loss"), ("tasks", "score")):
        for name, of_base in base[group].items():
            title = f"{of_base['kind']}: {name}, {of_base.get('metric', 'loss')}"
            rows = []
            for label, model in models.items():
                entry = model[group].get(name)
                if entry is None:
                    rows.append(("", label, "can't be compared", *[""] * 6))
                    continue
                found, compared = entry[quantity], entry["difference"]
                value = f"{found['mean']:.4f}"
                if group == "corpora":
                    value += f" (perplexity {entry['perplexity']:.4g})"
                row = [
                    "" if rows else title,
                    label,
                    value,
                    _range(found),
                    f"{found['count']} {entry['over']}",
                ]
                if compared is None:
                    row += ["", "", "", ""]
                else:
                    row += [f"{compared['mean']:+.4f}", _range(compared)]
                    row += [_p(compared["p_t"]), _p(compared["p_sign_flip"])]
                rows.append(tuple(row))
            yield rows


def _range(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f"{entry['low']:.4f} to {entry['high']:.4f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _overlap_line(overlap: Mapping[str, Any]) -> str:
    if overlap["found"] is None:
        text = "not measured; name the raw text in the suite's unlabelled_text"
    else:
        share = overlap["found"] / overlap["examples"]
        text = f"{overlap['found']:,} of {overlap['examples']:,} scored examples ({share:.1%})"
        text += " share eight words in a row with the unlabelled text"
    if overlap["excluded_from"]:
        text += f"; their documents were left out of {', '.join(overlap['excluded_from'])}"
    elif overlap["found"]:
        text += "; shard_corpus.py --exclude leaves such documents out"
    return text
