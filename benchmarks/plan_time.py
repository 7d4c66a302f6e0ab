"""Step times that ``tools/plan.py`` predicts, against runs of the program on this machine.

    python -m benchmarks.plan_time DATA [--shapes minilm roberta-base] [--methods mlm dga] [--ranks 1 2]

DATA is a folder with corpora/acl.jsonl.gz and models/minilm-l6-mlm. A probe on the run's own number of
ranks, all at once, measures what a GPU's data sheet says: the rate of the blocks' matrix products in bf16,
the bytes a second of their other kernels (activation, sums, norms, dropout; forward and backward), and
gloo's bandwidth in an all-reduce. It writes them to a YAML file, the plan reads that as ``--gpu``, and a run
of packed text under ZeRO-2 is held against it. The probe is taken before and after the run, so that what
else the machine does falls on both; the mean counts. A run's figure is the median of its steps after the
first two.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import AutoConfig, AutoTokenizer, RobertaConfig

from benchmarks.results import append_section
from dga_scale.backbone.cpu_kernels import Dropout
from tests.helpers.ranks import free_port, run_ranks

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "plan_time"
LENGTH = 128
WARM_UP = 2
ROWS = {"minilm": 16, "roberta-base": 4}
"""Of a rank: steps of about a second."""
METHODS = {
    "mlm": ("--method", "mlm"),
    "dga": ("--method", "dga", "--soft_mask", "update", "--importance_samples", "16"),
}
JSON = "ds_configs/zero2.json"


def probe(hidden: int, inner: int, tokens: int, seconds: float) -> dict[str, float]:
    """What this rank's cores reach while the others are as busy: FLOP/s, and bytes/s of kernels and links."""
    wide = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    first, second = nn.Linear(hidden, inner).bfloat16(), nn.Linear(inner, hidden).bfloat16()
    square, norm, drop = nn.Linear(hidden, hidden).bfloat16(), nn.LayerNorm(hidden).bfloat16(), Dropout(0.1)
    full = torch.randn(tokens, inner, dtype=torch.bfloat16, requires_grad=True)
    gradient, full_gradient = torch.ones_like(wide), torch.ones_like(full)

    def products() -> None:
        (second(first(wide)) + square(wide)).backward(gradient)

    def kernels() -> None:
        F.gelu(full).backward(full_gradient)
        norm(wide + drop(wide)).backward(gradient)

    sent = torch.zeros(8_000_000)
    size, ranks = 4 * len(sent), dist.get_world_size()
    flops = 6.0 * tokens * hidden * (2 * inner + hidden)
    # As ``planning.cost.moved_bytes`` counts them: half of a block's sums, norms and dropout.
    moved = tokens * (2 * 5 * inner + 2 * (6 + 5) * hidden + (8 * 2 + 4) / 2 * hidden)
    return {
        "flops": flops / seconds_of(products, seconds),
        "bytes": moved / seconds_of(kernels, seconds),
        "bus": 2 * (ranks - 1) / ranks * size / seconds_of(lambda: dist.all_reduce(sent) and None, seconds),
    }


def seconds_of(work: Callable[[], None], seconds: float) -> float:
    """Median seconds of ``work``, as often on every rank, for about so long."""
    took = []
    work()
    started = time.perf_counter()
    work()
    times = torch.tensor(max(3.0, min(200.0, seconds / (time.perf_counter() - started))))
    dist.all_reduce(times, dist.ReduceOp.MIN)
    for _ in range(int(times)):
        dist.barrier()
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def describe(found: dict[str, float], ranks: int, path: Path) -> None:
    """Write what was measured as a ``--gpu`` file; nothing in it is assumed to be reached in part only."""
    link = max(found["bus"], 1.0) / 1e9  # one rank sends nothing
    content = {
        "memory_gib": psutil.virtual_memory().total / 2**30 / ranks,
        "bf16_tflops": found["flops"] / 1e12,
        "fp32_tflops": found["flops"] / 1e12,
        "memory_gbs": found["bytes"] / 1e9,
        "intra_node_gbs": link,
        "inter_node_gbs": link,
        "product_efficiency": 1.0,
        "memory_efficiency": 1.0,
        "link_efficiency": 1.0,
        "overlap": 0.0,  # the cores that would hide it are busy
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def prepare(data: Path, shape: str) -> tuple[Path, Path]:
    """The model's folder and the corpus's, made where they are not there yet."""
    small = data / "models" / "minilm-l6-mlm"
    model = small
    if shape == "roberta-base":
        model = WORK / shape
        tokenizer = AutoTokenizer.from_pretrained(small)
        tokenizer.save_pretrained(model)
        RobertaConfig(
            architectures=["RobertaForMaskedLM"], vocab_size=50265, max_position_embeddings=514,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        ).save_pretrained(model)  # fmt: skip
    corpus = WORK / "acl"
    run("tools/shard_corpus.py", data / "corpora" / "acl.jsonl.gz", "--tokenizer", small, "--output", corpus,
        "--sequence_length", LENGTH, "--packing", "chunk")  # fmt: skip
    return model, corpus


def run(*command: Any, codes: tuple[int, ...] = (0,)) -> str:
    """Run Python on ``command`` in the repository, one thread a rank; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    if done.returncode not in codes:
        sys.exit(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stdout}")
    return done.stdout


def measured(flags: list[Any], ranks: int, steps: int, output: Path) -> float:
    """Median seconds of a step of a run."""
    shutil.rmtree(output, ignore_errors=True)
    run("-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", free_port(),
        "launchers/dga_train.py", *flags, "--output_dir", output, "--max_steps", steps, "--save_steps", steps,
        "--eval_steps", steps, "--max_eval_samples", 4)  # fmt: skip
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median([each["step_seconds"] for each in lines if "step_seconds" in each][WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--probe_seconds", type=float, default=1.0)
    options = parser.parse_args()
    from benchmarks import plan_time  # this file by the name under which the ranks can import it

    columns = ["model", "method", "ranks x rows", "products, GFLOP/s", "kernels, GB/s", "all-reduce, GB/s",
               "passes, s", "optimizer", "links", "predicted step", "measured", "ratio"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    ratios = []
    for shape in options.shapes:
        model, corpus = prepare(options.data, shape)
        sizes = AutoConfig.from_pretrained(model)
        for method in options.methods:
            for ranks in options.ranks:
                rows = ROWS[shape]
                tokens = rows * LENGTH * (4 if method == "dga" else 1)
                arguments = (sizes.hidden_size, sizes.intermediate_size, tokens, options.probe_seconds)
                flags = ["--model", model, "--ds_config", JSON, *METHODS[method],
                         "--global_batch_size", rows * ranks]  # fmt: skip
                if shape != "minilm":
                    flags += ["--random_init", "true"]
                probes = [run_ranks(ranks, plan_time.probe, *arguments)]
                took = measured([*flags, "--corpus", corpus], ranks, options.steps, WORK / "run")
                probes.append(run_ranks(ranks, plan_time.probe, *arguments))
                every = [each for both in probes for each in both]
                found = {name: statistics.mean(each[name] for each in every) for name in every[0]}
                described = WORK / "cpu.yaml"
                describe(found, ranks, described)
                said = run("tools/plan.py", *flags, "--gpus", ranks, "--gpus_per_node", ranks, "--gpu",
                           described, "--sequence_length", LENGTH, "--json", codes=(0, 1))  # fmt: skip
                planned = json.loads(said)["planned"]["seconds"]
                lines.append(row(shape, method, f"{ranks} x {rows}", found, planned, took))
                ratios.append(planned["step"] / took)
                print(lines[-1], flush=True)
    middle = statistics.median(ratios)
    lines += ["", f"Predicted over measured: {min(ratios):.2f} to {max(ratios):.2f}, median {middle:.2f}."]
    append_section(
        "Planned time of a step",
        "\n".join(lines),
        " ".join(["python -m benchmarks.plan_time", *sys.argv[1:]]),
    )


def row(
    shape: str, method: str, sizes: str, found: dict[str, float], planned: dict[str, float], took: float
) -> str:
    """A line of the table."""
    rates = [f"{found['flops'] / 1e9:.0f}", f"{found['bytes'] / 1e9:.1f}", f"{found['bus'] / 1e9:.2f}"]
    parts = [planned[name] for name in ("passes", "optimizer", "exposed", "step")]
    cells = [*rates, *(f"{part:.2f}" for part in (*parts, took)), f"{planned['step'] / took:.2f}"]
    return f"| {shape} | {method} | {sizes} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
