"""Time of a training step: ours against transformers' Trainer and a plain DGA.

    python -m benchmarks.steps DATA [--shape minilm|roberta-base] [--text packed|reviews] [--rounds 3]

All systems (``baselines.py`` has those that are not ours) run ZeRO-2 in bf16 on the same rows, one thread a
rank, the same rows a rank, the model's own dropout. They take turns, round after round, so that what else the
machine does falls on all; a system's figure in a round is the median of its steps after the first three,
whole steps from end to end. The table has the median of the rounds and their range, as ratios to the
Trainer's, to our plain MLM's and to the plain DGA's.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import (
    SHAPES,
    TEXTS,
    WARM_UP,
    WORK,
    corpus_of,
    keep_section,
    launch,
    model_of,
    options_of,
    ratios,
    spread,
    table,
    train,
)

DGA = ("--method", "dga", "--importance_samples", "32")
OURS = {
    "mlm": ("--method", "mlm"),
    "dga, no mask": (*DGA, "--soft_mask", "none"),
    "dga gradient": (*DGA, "--soft_mask", "gradient"),
    "dga update": (*DGA, "--soft_mask", "update"),
}
BASELINES = ("trainer", "plain_dga")


def main() -> None:
    """Measure all systems that are asked for."""
    options = options_of(
        __doc__,
        choices={"shape": SHAPES, "text": TEXTS, "systems": [*BASELINES, *OURS]},
        shape="minilm",
        text="packed",
        systems=[*BASELINES, *OURS],
        ranks=2,
        batch_size=16,
        steps=12,
        rounds=3,
    )
    model, corpus = model_of(options.data, options.shape), corpus_of(options.data, *TEXTS[options.text])
    seconds: dict[str, list[float]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name, medians in seconds.items():
            medians.append(measure(name, model, corpus, options))
            print(f"round {number + 1}: {name} {medians[-1]:.3f} s", flush=True)
    rows = f"{options.ranks} ranks x {options.batch_size} rows of at most 128 tokens, {options.text} text"
    title = f"Time of a step, {options.shape}, {options.text} text"
    keep_section(title, f"{rows}.\n\n{comparison(seconds)}")


def measure(name: str, model: Path, corpus: Path, options: argparse.Namespace) -> float:
    """Return the median seconds of a step in one run of a system."""
    output = WORK / "run"
    folders = ("--model", model, "--corpus", corpus)
    if name in BASELINES:
        launch(options.ranks, "benchmarks.baselines", name, *folders, "--output_dir", output,
               "--steps", options.steps, "--batch_size", options.batch_size)  # fmt: skip
        steps: list[float] = json.loads((output / "steps.json").read_text(encoding="utf-8"))
    else:
        train(options.ranks, output, options.steps, *folders, *OURS[name], "--max_eval_samples", 16,
              "--global_batch_size", options.batch_size * options.ranks)  # fmt: skip
        events = EventAccumulator(str(output / "tensorboard"))
        events.Reload()
        ends = [event.wall_time for event in events.Scalars("loss/total")]
        steps = [b - a for a, b in pairwise(ends)]
    return statistics.median(steps[WARM_UP - 1 :])


def comparison(seconds: dict[str, list[float]]) -> str:
    """Compare seconds, and round by round with the Trainer's, our plain MLM's and the plain DGA's."""
    others = [name for name in ("trainer", "mlm", "plain_dga") if name in seconds]
    rows = [["system", "seconds", *(f"/ {name}" for name in others)]]
    for name, values in seconds.items():
        rows.append([name, spread(values), *(spread(ratios(values, seconds[o])) for o in others)])
    return table(rows)


if __name__ == "__main__":
    main()
