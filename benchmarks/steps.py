"""Time of a training step: ours against transformers' Trainer, a plain DGA and a bare DeepSpeed loop.

    python benchmarks/steps.py DATA [--shape minilm|roberta-base] [--text packed|reviews] [--rounds 3]

DATA is a folder with corpora/NAME.jsonl.gz and models/minilm-l6-mlm. All systems run ZeRO-2 in bf16 on the
same rows, one thread a rank, the same rows a rank, the model's own dropout. They take turns, round after
round, so that what else the machine does falls on all; a system's figure in a round is the median of its
steps after the first three, whole steps from end to end. The table has the median of the rounds and their
range, as ratios to the Trainer's and to our plain MLM's, and is appended to RESULTS.md.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import append_section
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "steps"
WARM_UP = 3
"""Steps that are not counted: kernels are chosen, buffers allocated."""
TEXT = {"packed": ("acl", "chunk"), "reviews": ("restaurant", "document")}
"""Corpus and packing. A review is a row of its own, most of them far shorter than 128 tokens."""
DGA = ("--method", "dga", "--importance_samples", "32")
OURS = {
    "mlm": ("--method", "mlm"),
    "dga, no mask": (*DGA, "--soft_mask", "none"),
    "dga gradient": (*DGA, "--soft_mask", "gradient"),
    "dga update": (*DGA, "--soft_mask", "update"),
}
RIVALS = ("trainer", "plain_dga", "bare")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--text", choices=list(TEXT), default="packed")
    parser.add_argument("--systems", nargs="+", choices=[*RIVALS, *OURS], default=[*RIVALS, *OURS])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, corpus = prepare(options)
    seconds: dict[str, list[float]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name, medians in seconds.items():
            medians.append(measure(name, model, corpus, options))
            print(f"round {number + 1}: {name} {medians[-1]:.3f} s", flush=True)
    rows = f"{options.ranks} ranks x {options.batch_size} rows of at most 128 tokens, {options.text} text"
    title = f"Time of a step, {options.shape}, {options.text} text"
    append_section(
        title, f"{rows}.\n\n{table(seconds)}", " ".join(["python", "benchmarks/steps.py", *sys.argv[1:]])
    )


def prepare(options: argparse.Namespace) -> tuple[Path, Path]:
    """The model's folder and the corpus's, made where they are not there yet."""
    small = options.data / "models" / "minilm-l6-mlm"
    model = small
    if options.shape == "roberta-base":
        model = WORK / "roberta-base-shaped"
        if not model.exists():
            tokenizer = AutoTokenizer.from_pretrained(small)
            config = RobertaConfig(
                vocab_size=50265,
                max_position_embeddings=514,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.cls_token_id,
                eos_token_id=tokenizer.sep_token_id,
            )
            AutoModelForMaskedLM.from_config(config).save_pretrained(model)
            tokenizer.save_pretrained(model)
    name, packing = TEXT[options.text]
    corpus = WORK / f"{name}-{packing}"
    run("tools/shard_corpus.py", options.data / "corpora" / f"{name}.jsonl.gz", "--tokenizer", small,
        "--output", corpus, "--sequence_length", 128, "--packing", packing)  # fmt: skip
    return model, corpus


def run(*command: Any) -> str:
    """Run Python on ``command`` in the repository, one thread a rank; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stdout}")
    return done.stdout


def free_port() -> int:
    """A port of this machine that nobody listens on: other runs may use the launcher's usual one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(name: str, model: Path, corpus: Path, options: argparse.Namespace) -> float:
    """Median seconds of a step in one run of a system."""
    output = WORK / "run"
    shutil.rmtree(output, ignore_errors=True)
    launch = ("-m", "deepspeed.launcher.runner", "--num_gpus", options.ranks, "--master_port", free_port())
    shared = ("--model", model, "--corpus", corpus, "--output_dir", output)
    if name in RIVALS:
        said = run(*launch, "benchmarks/rivals.py", name, *shared, "--steps", options.steps,
                   "--batch_size", options.batch_size)  # fmt: skip
        lines = [line for line in said.splitlines() if line.startswith("[") and line.endswith("]")]
        steps: list[float] = json.loads(
            next(line for line in lines if line[1:2].isdigit() and "." in line[:20])
        )
    else:
        run(*launch, "launchers/dga_train.py", "--ds_config", "ds_configs/zero2.json", *shared, *OURS[name],
            "--max_steps", options.steps, "--global_batch_size", options.batch_size * options.ranks,
            "--max_eval_samples", 16, "--save_steps", options.steps,
            "--eval_steps", options.steps)  # fmt: skip
        events = EventAccumulator(str(output / "tensorboard"))
        events.Reload()
        ends = [event.wall_time for event in events.Scalars("loss/total")]
        steps = [b - a for a, b in pairwise(ends)]
    return statistics.median(steps[WARM_UP - 1 :])


def table(seconds: dict[str, list[float]]) -> str:
    """A row for each system: seconds, and ratios of each round to the Trainer's, plain MLM's, plain DGA's."""
    against = [name for name in ("trainer", "mlm", "plain_dga") if name in seconds]
    lines = [f"| system | seconds | {' | '.join(f'/ {name}' for name in against)} |"]
    lines.append("|---" * (2 + len(against)) + "|")
    for name, values in seconds.items():
        ratios = [[a / b for a, b in zip(values, seconds[other], strict=True)] for other in against]
        cells = [name, spread(values), *map(spread, ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median, and the range where there are several."""
    around = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{around}"


if __name__ == "__main__":
    main()
