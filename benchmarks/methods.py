"""All methods on one domain at equal tokens: domain and general loss over seeds, and what a step costs.

    python benchmarks/methods.py DATA [--steps 40] [--seeds 42 43] [--methods mlm dga ...]

DATA is a folder with corpora/NAME.jsonl.gz, endtasks/ and models/minilm-l6-mlm. Text is sharded and every
method trained on two ranks under ZeRO-2 by the program's own commands; what is finished is not run again.
Times of steps are those of the last seed's runs: leave the machine alone meanwhile. The table is appended to
benchmarks/RESULTS.md. End tasks, several domains and sequences of them: benchmarks/paper_tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import append_section

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "methods"
MIX = ("--mix", f"{WORK / 'general_wikipedia'}:0.05")
VARIANTS: dict[str, tuple[str, ...]] = {
    "mlm": ("--method", "mlm"),
    "rehearsal 5%": ("--method", "rehearsal", *MIX),
    "kl 5%": ("--method", "kl", *MIX),
    "l2": ("--method", "l2", "--l2_weight", "0.1"),
    "ewc": ("--method", "ewc", "--ewc_weight", "0.1", "--general_corpus", str(WORK / "general_wikipedia"),
            "--fisher_samples", "200"),
    "dga gradient": ("--method", "dga", "--soft_mask", "gradient", "--importance_samples", "512"),
    "dga update": ("--method", "dga", "--soft_mask", "update", "--importance_samples", "512"),
    "das update": ("--method", "das", "--soft_mask", "update", "--importance_samples", "512"),
    "kd": ("--method", "kd"),
    "adapted_deit": ("--method", "adapted_deit"),
    "simcse": ("--method", "simcse"),
    "tacl": ("--method", "tacl"),
    "taco": ("--method", "taco"),
    "infoword": ("--method", "infoword"),
    "lora": ("--method", "lora", "--learning_rate", "1e-3"),
    "adapter": ("--method", "adapter", "--learning_rate", "1e-3"),
    "prompt": ("--method", "prompt", "--learning_rate", "1e-3"),
    "cse 20%": ("--method", "cse", "--mix", f"{WORK / 'general_wikipedia'}:0.2", "--cse_samples", "1024"),
    "freeze_layers 3": ("--method", "mlm", "--freeze_layers", "3"),
}  # fmt: skip
"""By the name in the tables: the flags. Parameter-efficient ones get the learning rate they are used at."""
SHARED = ("--bf16", "true", "--save_total_limit", "1", "--max_eval_samples", "256")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    shard(arguments.data, ["acl", "general_wikipedia", "general_wikipedia_heldout"])
    command = " ".join(["python", "benchmarks/methods.py", *sys.argv[1:]])
    append_section("All methods on ACL", losses(arguments), command)


def shard(data: Path, names: list[str]) -> None:
    """Make corpora of rows of 128 tokens; a fiftieth of each is held out."""
    for name in names:
        text = data / "corpora" / f"{name}.jsonl.gz"
        share = 0 if "heldout" in name else 0.02
        run("tools/shard_corpus.py", text, "--tokenizer", data / "models" / "minilm-l6-mlm", "--output",
            WORK / name, "--sequence_length", 128, "--validation_share", share)  # fmt: skip


def run(*command: Any) -> None:
    """Run Python on ``command`` in the repository, one thread a rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True)


def train(arguments: argparse.Namespace, output: Path, *flags: Any) -> None:
    """One run of the program on two ranks, unless it is finished."""
    if not (output / "report.html").exists():
        steps = arguments.steps
        run("-m", "deepspeed.launcher.runner", "--num_gpus", 2, "launchers/dga_train.py", "--ds_config",
            "ds_configs/zero2.json", "--model", arguments.data / "models" / "minilm-l6-mlm", "--corpus",
            WORK / "acl", "--general_eval_corpus", WORK / "general_wikipedia_heldout", "--output_dir", output,
            "--max_steps", steps, "--eval_steps", steps, "--save_steps", steps, "--learning_rate",
            arguments.learning_rate, "--global_batch_size", arguments.global_batch_size, *SHARED,
            *flags)  # fmt: skip


def losses(arguments: argparse.Namespace) -> str:
    """Held-out losses after each method, mean and spread over seeds; time and memory of the last seed."""
    columns = ["method", "domain loss", "change", "general loss", "change", "seeds", "step, s"]
    columns += ["step / mlm's", "memory of a rank, GiB", "memory / mlm's"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    plain: tuple[float, float] | None = None
    for name in arguments.methods:
        found: dict[str, list[tuple[float, float]]] = {"domain_loss": [], "general_loss": []}
        for seed in arguments.seeds:
            output = WORK / f"{name.replace(' ', '-')}-{arguments.steps}x{arguments.global_batch_size}-{seed}"
            train(arguments, output, *VARIANTS[name], "--seed", seed)
            summary = json.loads((output / "summary.json").read_text())
            for key, values in found.items():
                values.append((summary[key]["before"], summary[key]["after"]))
        cells = [name]
        for values in found.values():
            cells += [figure([after for _, after in values]), figure([b - a for a, b in values], "+")]
        seconds, memory = cost(output)
        plain = plain or (seconds, memory)
        cells += [str(len(arguments.seeds)), f"{seconds:.2f}", f"{seconds / plain[0]:.2f}", f"{memory:.2f}",
                  f"{memory / plain[1]:.2f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    before = " and ".join(f"{key.replace('_', ' ')} {values[0][0]:.3f}" for key, values in found.items())
    tokens = arguments.steps * arguments.global_batch_size * 128
    rates = f"Learning rate {arguments.learning_rate:g}; 1e-3 for lora, adapter and prompt."
    return f"{tokens:,} tokens each; before: {before}. {rates}\n\n" + "\n".join(lines)


def cost(run_folder: Path) -> tuple[float, float]:
    """Median seconds of a step after the first three, and the most memory of rank 0 in GiB."""
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "step_seconds" in record][3:]
    return statistics.median(r["step_seconds"] for r in steps), max(r["memory_gib"][0] for r in steps)


def figure(values: list[float], sign: str = "") -> str:
    """Mean, and half the range over seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{half}"


if __name__ == "__main__":
    main()
