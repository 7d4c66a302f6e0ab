"""What DGA's parts cost beside a step: masks, importance, the contrast's gather, GradCache, shared readings.

    python benchmarks/overheads.py DATA [--shape minilm|roberta-base] [--rounds 10]

DATA as for ``steps.py``; ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank. Masks, readings and
contrasts take turns step by step in one process on the same batches: medians of the paired ratios, with 95%
confidence intervals from the bootstrap. Masks are measured by the clock around them too, as a difference of
whole steps hardly shows a hundredth. The table is appended to RESULTS.md, with the targets.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from results import append_section
from steps import WORK, free_port, prepare, run

STEPS = 2500
IMPORTANCE_ROWS = 10_000
"""A run of the papers, and the rows that its importance is measured on (``--importance_samples``)."""
HOOKS, UPDATE, IMPORTANCE = 0.01, 0.03, 0.02
"""Targets, as shares of a step or a run."""
PASSES = 4
GLOBAL_BATCHES = (256, 32)
"""The papers', and that of ``steps.py``."""


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each variant")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes of the gather")
    options = parser.parse_args()
    options.text = "packed"
    model, corpus = prepare(options)
    output = WORK / "overheads"

    def measured(*command: Any, rounds: int, rows: int) -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        run(*command, "--model", model, "--corpus", corpus, "--output_dir", output, "--rounds", rounds,
            "--batch_size", rows)  # fmt: skip
        found: dict[str, Any] = json.loads((output / "figures.json").read_text())
        return found

    parts = "benchmarks/overhead_parts.py"
    local = measured(parts, "local", "--passes", PASSES, rounds=options.rounds, rows=options.batch_size)
    gathers = {}
    for ranks in options.ranks:
        launch = ("-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", free_port())
        gathers[ranks] = measured(*launch, parts, "gather", rounds=3, rows=options.batch_size)
    sections = (
        masks(local),
        importance(local["importance"], options.batch_size),
        contrast(local["contrast"]),
        gather(gathers),
    )
    title = f"What DGA's parts cost, {options.shape}"
    body = f"{options.batch_size} rows of 128 tokens a step of a rank, one thread a rank.\n\n"
    command = " ".join(["python", "benchmarks/overheads.py", *sys.argv[1:]])
    append_section(title, body + "\n\n".join(sections), command)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the ends of its 95% interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return statistics.median(values), float(low), float(high)


def ratio(values: list[float], to: list[float]) -> str:
    """Median of paired ratios, with its interval."""
    median, low, high = interval([a / b for a, b in zip(values, to, strict=True)])
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def masks(local: dict[str, Any]) -> str:
    """By method, the seconds inside masks over those of a step without, and the ratio of whole steps."""
    lines = [
        "| soft-mask | inside it, of a step | target | met | step / step without |",
        "|---|---|---|---|---|",
    ]
    for method in ("dga", "das"):
        steps, inside = local[method]["steps"], local[method]["inside"]
        plain = statistics.median(steps["none"])
        for name, target in (("gradient", HOOKS), ("update", UPDATE)):
            median, low, high = interval([seconds / plain for seconds in inside[name]])
            lines.append(
                f"| {method} {name} | {median:.2%} ({low:.2%} to {high:.2%}) | {target:.0%} | "
                f"{'yes' if median < target else 'no'} | {ratio(steps[name], steps['none'])} |"
            )
    return "\n".join(lines)


def importance(found: dict[str, list[float]], rows: int) -> str:
    """The importance of 10,000 rows, as a share of a run of 2,500 steps by global batch.

    A step of G rows is G / rows passes and one step of the optimizer.
    """
    measured, step, optimizer = (statistics.median(found[key]) for key in ("importance", "step", "optimizer"))
    costs = (
        f"Importance takes {measured / rows * 1e3:.1f} ms a row, forward and backward pass of a step "
        f"{(step - optimizer) / rows * 1e3:.1f} ms, the optimizer {optimizer * 1e3:.0f} ms a step.\n"
    )
    lines = [
        costs,
        f"| global batch | importance of {IMPORTANCE_ROWS:,} rows, of {STEPS:,} steps | target | met |",
        "|---|---|---|---|",
    ]
    for total in GLOBAL_BATCHES:
        training = STEPS * ((step - optimizer) * total / rows + optimizer)
        share = IMPORTANCE_ROWS / rows * measured / training
        verdict = "yes" if share < IMPORTANCE else "no"
        lines.append(f"| {total} | {share:.2%} | {IMPORTANCE:.0%} | {verdict} |")
    return "\n".join(lines)


def contrast(seconds: dict[str, list[float]]) -> str:
    """Steps of several passes, against DGA as in the paper with negatives of each pass."""
    lines = [f"| DGA, {PASSES} passes a step | seconds | / the paper's |", "|---|---|---|"]
    for name, values in seconds.items():
        lines.append(f"| {name} | {statistics.median(values):.3f} | {ratio(values, seconds['paper'])} |")
    return "\n".join(lines)


def gather(found: dict[int, dict[str, list[float]]]) -> str:
    """The contrast's time by world size."""
    lines = ["| ranks | contrast with its gather, ms | of a step |", "|---|---|---|"]
    for ranks, figures in found.items():
        step, (median, low, high) = statistics.median(figures["step"]), interval(figures["contrast"])
        lines.append(
            f"| {ranks} | {median * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f}) | {median / step:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
