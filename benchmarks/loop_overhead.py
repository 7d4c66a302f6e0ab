"""What a run does beside DeepSpeed's forward, backward and step: logging, curves, stop signals.

    python benchmarks/loop_overhead.py DATA [--method mlm] [--ranks 2] [--rounds 3]

DATA as for ``steps.py``; ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank, every step logged. The
clock runs around each call of the engine, and from the beginning of a step to that of the next; what is left
is ours. Whole runs of two programs differ by more than that from round to round. A part of it is the one
small reduction of a step, in which a rank also waits for the others: without it, it would wait in the next
step's. Rank 0's medians are appended to RESULTS.md, with the target.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import append_section
from steps import OURS, WARM_UP, WORK, free_port, prepare, run, spread

TARGET = 0.02
OUTPUT = WORK / "loop_overhead"


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--method", choices=list(OURS), default="mlm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.text = "packed"
    model, corpus = prepare(options)
    rounds = []
    for number in range(options.rounds):
        shutil.rmtree(OUTPUT, ignore_errors=True)
        run("-m", "deepspeed.launcher.runner", "--num_gpus", options.ranks, "--master_port", free_port(),
            "benchmarks/loop_overhead.py", "--ds_config", "ds_configs/zero2.json", "--model", model,
            "--corpus", corpus, "--output_dir", OUTPUT, *OURS[options.method], "--max_steps", options.steps,
            "--global_batch_size", options.batch_size * options.ranks, "--max_eval_samples", 16,
            "--save_steps", options.steps, "--eval_steps", options.steps)  # fmt: skip
        rounds.append(figures())
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    lines = ["| | of the engine's time |", "|---|---|"]
    lines += [
        f"| {name} | {spread([100 * r[name] for r in rounds])}% |" for name in rounds[0] if name != "seconds"
    ]
    ours = statistics.median(r["ours"] for r in rounds)
    body = (
        f"{options.ranks} ranks x {options.batch_size} rows, {options.method}; the engine's forward, "
        f"backward and step take {spread([r['seconds'] for r in rounds])} s.\n\n" + "\n".join(lines) + "\n\n"
        f"Target: ours under {TARGET:.0%} of bare DeepSpeed: {'met' if ours < TARGET else 'not met'}."
    )
    command = " ".join(["python", "benchmarks/loop_overhead.py", *sys.argv[1:]])
    append_section(f"What the loop costs beside DeepSpeed, {options.shape}", body, command)


def figures() -> dict[str, float]:
    """One run's medians of steps: the engine's seconds, and the rest as shares of those."""
    steps = json.loads((OUTPUT / "clock.json").read_text())
    log = [json.loads(line) for line in (OUTPUT / "log.jsonl").read_text().splitlines()]
    waits = [record["data_wait_seconds"] for record in log if "event" not in record]
    # The last step's end is that of the run, with its evaluation and its checkpoint.
    shares: dict[str, list[float]] = {"seconds": [], "ours": [], "reduction": [], "waiting for data": []}
    for number in range(WARM_UP, len(steps) - 1):
        step, wait = steps[number], waits[number]
        whole = steps[number + 1]["began"] - step["began"] - waits[number + 1]
        shares["seconds"].append(step["engine"])
        shares["ours"].append((whole - step["engine"]) / step["engine"])
        shares["reduction"].append(step["reduction"] / step["engine"])
        shares["waiting for data"].append(wait / step["engine"])
    return {name: statistics.median(values) for name, values in shares.items()}


def rank() -> None:
    """Train as the real program does, with a clock on the engine's calls."""
    from deepspeed import DeepSpeedEngine

    from dga_scale.launch.preemption import StopConsensus
    from dga_scale.train.cli import train_command
    from dga_scale.train.trainer import Session

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

    def train_step(self: Session, batches: Any) -> Any:
        steps.append({"began": time.perf_counter(), "engine": 0.0, "reduction": 0.0})
        return step(self, batches)

    step: Any = Session.train_step
    Session.train_step = train_step  # type: ignore[method-assign]
    for method in ("forward", "backward", "step"):
        setattr(DeepSpeedEngine, method, clocked(getattr(DeepSpeedEngine, method), "engine"))
    StopConsensus.average = clocked(StopConsensus.average, "reduction")  # type: ignore[method-assign]
    try:
        train_command()
    finally:
        if os.environ["RANK"] == "0":
            (OUTPUT / "clock.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    rank() if "RANK" in os.environ else main()
