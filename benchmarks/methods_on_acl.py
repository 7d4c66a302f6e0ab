"""Domain against general loss: plain MLM, DGA with gradient masks, DGA with update masks, at equal tokens.

    python benchmarks/methods_on_acl.py DATA [--steps 40] [--work DIR]

DATA is the folder with corpora/acl.jsonl.gz, corpora/general_wikipedia_heldout.jsonl.gz and
models/minilm-l6-mlm. Shards the text, trains each method on two ranks under ZeRO-2 with the program's own
command, and appends a table to benchmarks/RESULTS.md. Runs that are finished are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import append_section

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "mlm": ["--method", "mlm"],
    "dga gradient": ["--soft_mask", "gradient"],
    "dga update": ["--soft_mask", "update"],
}


def main() -> None:
    """Shard, train, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/methods_on_acl"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--global_batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    model = arguments.data / "models" / "minilm-l6-mlm"
    corpora = {}
    for name, share in (("acl", 0.02), ("general_wikipedia_heldout", 0.0)):
        corpora[name] = arguments.work / name
        text = arguments.data / "corpora" / f"{name}.jsonl.gz"
        run("tools/shard_corpus.py", text, "--tokenizer", model, "--output", corpora[name],
            "--sequence_length", 128, "--validation_share", share)  # fmt: skip
    summaries = {}
    for name, flags in METHODS.items():
        output = arguments.work / f"{name.replace(' ', '-')}-{arguments.steps}-{arguments.seed}"
        train = ["--ds_config", "ds_configs/zero2.json", "--model", model, "--corpus", corpora["acl"],
                 "--general_eval_corpus", corpora["general_wikipedia_heldout"], "--output_dir", output,
                 "--max_steps", arguments.steps, "--global_batch_size", arguments.global_batch_size,
                 "--importance_samples", 512, "--max_eval_samples", 512, "--seed", arguments.seed,
                 "--save_total_limit", 1, *flags]  # fmt: skip
        run("-m", "deepspeed.launcher.runner", "--num_gpus", 2, "launchers/dga_train.py", *train)
        summaries[name] = json.loads((ROOT / output / "summary.json").read_text())
    append_section("Methods on ACL", table(summaries), " ".join(["python", *sys.argv]))


def run(*command: Any) -> None:
    """Run Python on ``command`` in the repository, one thread a rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True)


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Losses before and after, and what a step costs against plain MLM's."""
    lines = [
        "| method | domain loss | change | general loss | change | tokens | step time / mlm's |",
        "|---|---|---|---|---|---|---|",
    ]
    base = summaries["mlm"]["seconds_per_step"]
    for name, summary in summaries.items():
        cells = [name]
        for which in ("domain_loss", "general_loss"):
            before, after = summary[which]["before"], summary[which]["after"]
            cells += [f"{before:.3f} -> {after:.3f}", f"{after - before:+.3f}"]
        cells += [f"{summary['tokens']:,}", f"{summary['seconds_per_step'] / base:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
