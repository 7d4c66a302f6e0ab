"""Step times that ``tools/plan.py`` predicts, against runs of the program on this machine.

    python -m benchmarks.plan_time DATA [--shapes minilm roberta-base] [--methods mlm dga] [--ranks 1 2]

A probe on the run's own number of ranks, all at once, measures what a GPU's data sheet says: the rate of the
blocks' matrix products in bf16, the bytes a second of their other kernels (activation, sums, norms, dropout;
forward and backward), and gloo's bandwidth in an all-reduce. It writes them to a YAML file, the plan reads
that as ``--gpu``, and a run of packed text under ZeRO-2 is held against it. The probe is taken before and
after the run, so that what else the machine does falls on both; the mean counts. A run's figure is the median
of its steps after the first three.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from benchmarks.common import (
    SEQUENCE_LENGTH,
    WORK,
    corpus_of,
    keep_section,
    model_of,
    on_ranks,
    options_of,
    run,
    settled_steps,
    table,
    train,
)

ROWS = {"minilm": 16, "roberta-base": 4}
"""The rows of a rank: steps take about a second."""
METHODS = {
    "mlm": ("--method", "mlm"),
    "dga": ("--method", "dga", "--soft_mask", "update", "--importance_samples", "16"),
}


def probe(hidden: int, inner: int, tokens: int, seconds: float) -> dict[str, float]:
    """Return the FLOP/s and the bytes/s of kernels and links that this rank reaches beside busy others."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn

    from dga_scale.backbone.cpu_kernels import Dropout

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
    """Return the median seconds of ``work``, as often on every rank, for about so long."""
    import torch
    import torch.distributed as dist

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


def measured(ranks: int, steps: int, flags: list[object]) -> float:
    """Return the median seconds of a step of a run."""
    output = WORK / "run"
    train(ranks, output, steps, *flags, "--max_eval_samples", 4)
    return statistics.median(step["step_seconds"] for step in settled_steps(output))


def main() -> None:
    """Plan and run every shape with every method on every number of ranks."""
    options = options_of(
        __doc__,
        choices={"shapes": ROWS, "methods": METHODS},
        shapes=list(ROWS),
        methods=list(METHODS),
        ranks=[1, 2],
        steps=9,
        probe_seconds=1.0,
    )
    from transformers import AutoConfig  # whose import --help does not wait for

    corpus = corpus_of(options.data)
    columns = ["model", "method", "ranks x rows", "products, GFLOP/s", "kernels, GB/s", "all-reduce, GB/s",
               "compute, s", "optimizer", "links", "predicted step", "measured", "ratio"]  # fmt: skip
    lines, shares = [columns], []
    for shape, method, ranks in itertools.product(options.shapes, options.methods, options.ranks):
        model, rows = model_of(options.data, shape), ROWS[shape]
        sizes = AutoConfig.from_pretrained(model)
        tokens = rows * SEQUENCE_LENGTH * (4 if method == "dga" else 1)
        arguments = (sizes.hidden_size, sizes.intermediate_size, tokens, options.probe_seconds)
        flags = ["--model", model, *METHODS[method], "--global_batch_size", rows * ranks]
        probes = on_ranks(ranks, probe, *arguments)
        took = measured(ranks, options.steps, [*flags, "--corpus", corpus])
        probes += on_ranks(ranks, probe, *arguments)
        found = {name: statistics.mean(each[name] for each in probes) for name in probes[0]}
        described = WORK / "cpu.yaml"
        describe(found, ranks, described)
        said = run("tools/plan.py", *flags, "--ds_config", "ds_configs/zero2.json", "--gpus", ranks,
                   "--gpus_per_node", ranks, "--gpu", described, "--sequence_length", SEQUENCE_LENGTH,
                   "--json", codes=(0, 1))  # fmt: skip
        planned = json.loads(said)["planned"]["seconds"]
        shares.append(planned["step"] / took)
        rates = [f"{found['flops'] / 1e9:.0f}", f"{found['bytes'] / 1e9:.1f}", f"{found['bus'] / 1e9:.2f}"]
        seconds = [*(planned[name] for name in ("compute", "optimizer", "exposed", "step")), took, shares[-1]]
        lines.append([shape, method, f"{ranks} x {rows}", *rates, *(f"{each:.2f}" for each in seconds)])
        print(" | ".join(lines[-1]), flush=True)
    middle = statistics.median(shares)
    said = f"Predicted over measured: {min(shares):.2f} to {max(shares):.2f}, median {middle:.2f}."
    keep_section("Planned time of a step", f"{table(lines)}\n\n{said}")


if __name__ == "__main__":
    main()
