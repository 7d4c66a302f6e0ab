"""What a run does beside DeepSpeed's forward, backward and step: logging, curves, stop signals.

    python -m benchmarks.loop_overhead DATA [--method mlm] [--ranks 2] [--rounds 3]

ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank, every step logged. The clock runs around each
call of the engine, and from the beginning of a step to that of the next; what is left is ours. Whole runs of
two programs differ by more than that from round to round. A part of it is the one small reduction of a step,
in which a rank also waits for the others: without it, it would wait in the next step's. Figures are rank 0's
medians.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import (
    SHAPES,
    WARM_UP,
    WORK,
    corpus_of,
    keep_section,
    launch,
    met_or_missed,
    model_of,
    parser_of,
    spread,
    table,
)
from dga_scale.logging.json_lines import read_log

TARGET = 0.02
OUTPUT = WORK / "loop_overhead"
METHODS = {"mlm": (), "dga": ("--soft_mask", "update", "--importance_samples", 32)}


def main() -> None:
    """Measure in rounds."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--method", choices=list(METHODS), default="mlm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = options.batch_size * options.ranks
    model, corpus, steps = model_of(options.data, options.shape), corpus_of(options.data), options.steps
    rounds = []
    for number in range(options.rounds):
        shutil.rmtree(OUTPUT, ignore_errors=True)
        launch(options.ranks, "benchmarks.loop_overhead", "--ds_config", "ds_configs/zero2.json", "--model",
               model, "--corpus", corpus, "--output_dir", OUTPUT, "--method", options.method,
               *METHODS[options.method], "--max_steps", steps, "--save_steps", steps, "--eval_steps", steps,
               "--max_eval_samples", 16, "--global_batch_size", rows)  # fmt: skip
        rounds.append(figures())
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    seconds = spread(each.pop("seconds") for each in rounds)
    lines = [["", "of the engine's time"]]
    lines += [[name, f"{spread(100 * each[name] for each in rounds)}%"] for name in rounds[0]]
    met = met_or_missed(statistics.median(each["ours"] for each in rounds) < TARGET)
    body = (
        f"{options.ranks} ranks x {options.batch_size} rows, {options.method}; the engine's forward, "
        f"backward and step take {seconds} s.\n\n{table(lines)}\n\n"
        f"Target: ours under {TARGET:.0%} of bare DeepSpeed: {met}."
    )
    keep_section(f"What the loop costs beside DeepSpeed, {options.shape}", body)


def figures() -> dict[str, float]:
    """One run's medians of steps: the engine's seconds, and the rest as shares of those."""
    steps = json.loads((OUTPUT / "clock.json").read_text(encoding="utf-8"))
    log = read_log(OUTPUT / "log.jsonl")
    waits = [record["data_wait_seconds"] for record in log if "data_wait_seconds" in record]
    shares: dict[str, list[float]] = {"seconds": [], "ours": [], "reduction": [], "waiting for data": []}
    # The last step's end is that of the run, with its evaluation and its checkpoint.
    for number in range(WARM_UP, len(steps) - 1):
        step = steps[number]
        whole = steps[number + 1]["began"] - step["began"] - waits[number + 1]
        shares["seconds"].append(step["engine"])
        shares["ours"].append((whole - step["engine"]) / step["engine"])
        shares["reduction"].append(step["reduction"] / step["engine"])
        shares["waiting for data"].append(waits[number] / step["engine"])
    return {name: statistics.median(values) for name, values in shares.items()}


def rank() -> None:
    """Train as the real program does, with a clock on the engine's calls."""
    from deepspeed import DeepSpeedEngine

    from dga_scale.launch.preemption import StopConsensus
    from dga_scale.train.cli import train_command
    from dga_scale.train.trainer import Trainer

    steps: list[dict[str, float]] = []

    def clocked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if steps:
                    steps[-1][name] += time.perf_counter() - began

        return call

    step: Any = Trainer.step

    def timed_step(self: Trainer, batches: Any) -> Any:
        steps.append({"began": time.perf_counter(), "engine": 0.0, "reduction": 0.0})
        return step(self, batches)

    Trainer.step = timed_step  # type: ignore[method-assign]
    for method in ("forward", "backward", "step"):
        setattr(DeepSpeedEngine, method, clocked(getattr(DeepSpeedEngine, method), "engine"))
    StopConsensus.average = clocked(StopConsensus.average, "reduction")  # type: ignore[method-assign]
    try:
        train_command()
    finally:
        if os.environ["RANK"] == "0":
            (OUTPUT / "clock.json").write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    rank() if "RANK" in os.environ else main()
