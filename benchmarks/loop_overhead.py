"""What a run does beside DeepSpeed's forward, backward and step: logging, curves, stop signals.

    python -m benchmarks.loop_overhead DATA [--ranks 2] [--steps 25] [--rounds 3]

MiniLM and plain MLM under ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank, every step logged.
The clock runs around each call of the engine, and from the beginning of a step to that of the next; what is
left is ours. Whole runs of two programs differ by more than that from round to round. A part of it is the one
small reduction of a step, in which a rank also waits for the others: without it, it would wait in the next
step's. Figures are rank 0's medians.
"""

import json
import os
import statistics
import time
from itertools import pairwise
from typing import Any

from benchmarks.common import (
    WARM_UP,
    WORK,
    corpus_of,
    keep_section,
    met_or_missed,
    model_of,
    options_of,
    percent,
    spread,
    table,
    train,
)
from dga_scale.logging.json_lines import read_log

TARGET = 0.02
OUTPUT = WORK / "loop_overhead"


def main() -> None:
    """Measure in rounds."""
    options = options_of(__doc__, ranks=2, batch_size=16, steps=25, rounds=3)
    rows = options.batch_size * options.ranks
    model, corpus = model_of(options.data, "minilm"), corpus_of(options.data)
    rounds = []
    for number in range(options.rounds):
        train(options.ranks, OUTPUT, options.steps, "--model", model, "--corpus", corpus, "--method", "mlm",
              "--max_eval_samples", 16, "--global_batch_size", rows,
              program="benchmarks.loop_overhead")  # fmt: skip
        rounds.append(figures())
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    seconds = spread(each.pop("seconds") for each in rounds)
    lines = [["", "of the engine's time"]]
    lines += [[name, percent(each[name] for each in rounds)] for name in rounds[0]]
    met = met_or_missed(statistics.median(each["ours"] for each in rounds) < TARGET)
    body = (
        f"{options.ranks} ranks x {options.batch_size} rows, mlm; the engine's forward, "
        f"backward and step take {seconds} s.\n\n{table(lines)}\n\n"
        f"Target: ours under {TARGET:.0%} of bare DeepSpeed: {met}."
    )
    keep_section("What the loop costs beside DeepSpeed", body)


def figures() -> dict[str, float]:
    """Return one run's medians of steps: the engine's seconds, and the rest as shares of those."""
    marks = json.loads((OUTPUT / "clock.json").read_text(encoding="utf-8"))
    log = read_log(OUTPUT / "log.jsonl")
    waits = [record["data_wait_seconds"] for record in log if "data_wait_seconds" in record]
    steps = [[end - begin for begin, end in zip(*pair, strict=True)] for pair in pairwise(marks)]
    shares: dict[str, list[float]] = {"seconds": [], "ours": [], "reduction": [], "waiting for data": []}
    # From the beginning of a step to that of the next: the next one's batch has been waited for, too.
    settled = list(zip(steps, waits, waits[1:], strict=False))[WARM_UP:]
    for (whole, engine, reduction), wait, next_wait in settled:
        shares["seconds"].append(engine)
        shares["ours"].append((whole - next_wait - engine) / engine)
        shares["reduction"].append(reduction / engine)
        shares["waiting for data"].append(wait / engine)
    return {name: statistics.median(values) for name, values in shares.items()}


def rank() -> None:
    """Train as the real program does, with a clock on the engine's calls that each step reads."""
    from deepspeed import DeepSpeedEngine

    from benchmarks.trainers import inside
    from dga_scale.launch.preemption import StopConsensus
    from dga_scale.train.cli import train_command
    from dga_scale.train.trainer import Trainer

    marks: list[tuple[float, ...]] = []
    step: Any = Trainer.step

    def marked_step(self: Trainer, batches: Any) -> Any:
        marks.append((time.perf_counter(), *engine, *reduction))
        if batches.step + 1 == self.config.optimization.max_steps and self.cluster.rank == 0:
            (OUTPUT / "clock.json").write_text(json.dumps(marks), encoding="utf-8")
        return step(self, batches)

    Trainer.step = marked_step  # type: ignore[method-assign]
    calls = [(DeepSpeedEngine, name) for name in ("forward", "backward", "step")]
    with inside(*calls) as engine, inside((StopConsensus, "average")) as reduction:
        train_command()  # which ends the process


if __name__ == "__main__":
    rank() if "RANK" in os.environ else main()
