"""All methods on one domain at equal tokens: domain and general loss over seeds, and what a step costs.

    python -m benchmarks.experiments.methods DATA [--steps 40] [--seeds 42 43] [--methods mlm dga ...]

Text is sharded and every method trained on two ranks under ZeRO-2 by the program's own commands; what is
finished is not run again. Times of steps are those of the last seed's runs: leave the machine alone
meanwhile. End tasks, several domains and sequences of them: ``benchmarks.experiments.paper_tables``.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.common import (
    SEQUENCE_LENGTH,
    WARM_UP,
    WORK,
    corpus_of,
    keep_section,
    model_of,
    options_of,
    table,
    train,
)
from dga_scale.logging.json_lines import read_log

GENERAL = "{general}"
"""The word in flags that stands for the corpus of general text."""
MIX = ("--mix", f"{GENERAL}:0.05")
VARIANTS: dict[str, tuple[str, ...]] = {
    "mlm": ("--method", "mlm"),
    "rehearsal 5%": ("--method", "rehearsal", *MIX),
    "kl 5%": ("--method", "kl", *MIX),
    "l2": ("--method", "l2", "--l2_weight", "0.1"),
    "ewc": ("--method", "ewc", "--ewc_weight", "0.1", "--general_corpus", GENERAL, "--fisher_samples", "200"),
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
    "cse 20%": ("--method", "cse", "--mix", f"{GENERAL}:0.2", "--cse_samples", "1024"),
    "freeze_layers 3": ("--method", "mlm", "--freeze_layers", "3"),
}  # fmt: skip
"""The flags by the name in the tables; parameter-efficient ones get the learning rate they are used at."""


def main() -> None:
    """Run what is asked for."""
    options = options_of(
        __doc__,
        choices={"methods": VARIANTS},
        steps=40,
        global_batch_size=16,
        learning_rate=2e-4,
        seeds=[42, 43],
        methods=list(VARIANTS),
    )
    keep_section("All methods on ACL", losses(options))


def losses(options: argparse.Namespace) -> str:
    """Return the losses after each method, mean and spread over seeds; time and memory of the last seed."""
    data, steps, rows = options.data, options.steps, options.global_batch_size
    general = corpus_of(data, "general_wikipedia")
    held_out = corpus_of(data, "general_wikipedia_heldout", validation_share=0)
    shared = ("--model", model_of(data, "minilm"), "--corpus", corpus_of(data),
              "--general_eval_corpus", held_out, "--global_batch_size", rows, "--learning_rate",
              options.learning_rate, "--bf16", "true", "--save_total_limit", 1,
              "--max_eval_samples", 256)  # fmt: skip
    lines = [["method", "domain loss", "change", "general loss", "change", "seeds"]]
    lines[0] += ["step, s", "step / mlm's", "memory of a rank, GiB", "memory / mlm's"]
    plain: tuple[float, float] | None = None
    for name in options.methods:
        found: dict[str, list[tuple[float, float]]] = {"domain_loss": [], "general_loss": []}
        for seed in options.seeds:
            output = WORK / "methods" / f"{name.replace(' ', '-')}-{steps}x{rows}-{seed}"
            if not (output / "summary.json").exists():
                own = [flag.replace(GENERAL, str(general)) for flag in VARIANTS[name]]
                train(2, output, steps, *shared, *own, "--seed", seed)
            summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
            for key, values in found.items():
                values.append((summary[key]["before"], summary[key]["after"]))
        cells = [name]
        for values in found.values():
            cells += [figure([after for _, after in values]), figure([b - a for a, b in values], "+")]
        seconds, memory = cost(output)
        plain = plain or (seconds, memory)
        cells += [str(len(options.seeds)), f"{seconds:.2f}", f"{seconds / plain[0]:.2f}", f"{memory:.2f}"]
        lines.append([*cells, f"{memory / plain[1]:.2f}"])
        print(f"| {' | '.join(lines[-1])} |", flush=True)
    before = " and ".join(f"{key.replace('_', ' ')} {values[0][0]:.3f}" for key, values in found.items())
    rates = f"Learning rate {options.learning_rate:g}; 1e-3 for lora, adapter and prompt."
    tokens = steps * rows * SEQUENCE_LENGTH
    return f"{tokens:,} tokens each; before: {before}. {rates}\n\n{table(lines)}"


def cost(folder: Path) -> tuple[float, float]:
    """Return the median seconds of a step after the first three, and the most memory of rank 0 in GiB."""
    steps = [record for record in read_log(folder / "log.jsonl") if "step_seconds" in record]
    seconds = statistics.median(r["step_seconds"] for r in steps[min(WARM_UP, len(steps) - 1) :])
    return seconds, max(r["memory_gib"][0] for r in steps)


def figure(values: list[float], sign: str = "") -> str:
    """Format the mean, and half the range over seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{half}"


if __name__ == "__main__":
    main()
