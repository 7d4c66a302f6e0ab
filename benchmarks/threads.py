"""Time of a step where each rank takes all cores, as torch does by itself, and where ranks share them.

    python benchmarks/threads.py DATA [--ranks 2] [--rounds 3]

DATA as for ``steps.py``; plain MLM, ZeRO-2 in bf16, packed rows of 128 tokens. Both take turns; a round's
figure is the median of the steps after the first three. The table is appended to RESULTS.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from results import append_section
from steps import ROOT, WARM_UP, WORK, free_port, prepare, spread

OUTPUT = WORK / "threads"


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.text = "packed"
    model, corpus = prepare(options)
    cores = len(os.sched_getaffinity(0))
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", options.ranks,
        "launchers/dga_train.py", "--ds_config", "ds_configs/zero2.json", "--model", model,
        "--corpus", corpus, "--output_dir", OUTPUT, "--method", "mlm", "--max_steps", options.steps,
        "--max_eval_samples", 16, "--global_batch_size", options.batch_size * options.ranks,
    ]  # fmt: skip
    rounds: list[list[float]] = []
    for number in range(options.rounds):
        rounds.append([])
        for threads in (str(cores), None):
            shutil.rmtree(OUTPUT, ignore_errors=True)
            environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            if threads:
                environment["OMP_NUM_THREADS"] = threads
            launch = [*command[:5], "--master_port", free_port(), *command[5:]]
            subprocess.run([*map(str, launch)], cwd=ROOT, env=environment, check=True, capture_output=True)
            log = [json.loads(line) for line in (OUTPUT / "log.jsonl").read_text().splitlines()]
            seconds = [record["step_seconds"] for record in log if "event" not in record]
            rounds[-1].append(statistics.median(seconds[WARM_UP:]))
        print(f"round {number + 1}: all {rounds[-1][0]:.3f} s, shared {rounds[-1][1]:.3f} s", flush=True)
    every, shared = ([r[k] for r in rounds] for k in (0, 1))
    body = (
        f"{options.ranks} ranks x {options.batch_size} rows on {cores} cores.\n\n"
        "| threads of a rank | seconds of a step |\n|---|---|\n"
        f"| all cores | {spread(every)} |\n| its share | {spread(shared)} |\n"
        f"| ratio | {spread([b / a for a, b in zip(every, shared, strict=True)])} |"
    )
    said = " ".join(["python", "benchmarks/threads.py", *sys.argv[1:]])
    append_section(f"Threads of a rank, {options.shape}", body, said)


if __name__ == "__main__":
    main()
