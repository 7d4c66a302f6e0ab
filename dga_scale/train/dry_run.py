"""The dry run: one step of the real shapes, its memory and its time, and no files."""

import time

import torch
from rich.console import Console
from rich.table import Table

from dga_scale.launch.world import Cluster
from dga_scale.logging.run_log import silent_log
from dga_scale.logging.throughput import memory_gib
from dga_scale.train.inputs import Inputs
from dga_scale.train.trainer import Trainer
from dga_scale.zero.shards import shape_of


def dry_run(inputs: Inputs, cluster: Cluster) -> int:
    """Build everything, take one optimizer step, print what a run of these settings needs; exit code 0."""
    trainer = Trainer(inputs, cluster, silent_log())
    anatomy = trainer.anatomy
    kinds = trainer.method.kinds
    if kinds:
        trainer.protection.set({kind: torch.full(anatomy.unit_shape(kind), 0.5) for kind in kinds})
    with trainer.stream(0) as stream:
        batches = next(iter(stream))
        started = time.perf_counter()
        trainer.step(batches)
        seconds = time.perf_counter() - started
    memory = max(cluster.all_gather_object(memory_gib(cluster.device)))
    if cluster.rank == 0:
        _print(inputs, cluster, trainer, sum(batches.tokens_per_source), seconds, memory)
    return 0


def _print(
    inputs: Inputs, cluster: Cluster, trainer: Trainer, tokens: int, seconds: float, memory: float
) -> None:
    resolved = inputs.resolved
    steps = resolved.config.optimization.max_steps
    shapes = [shape_of(p) for p in trainer.model.parameters()]
    rows = steps * resolved.global_batch_size
    views = ", ".join(
        f"{view.name} ({'masked' if view.masked else 'clean'} text{', gated' if view.gated else ''})"
        for view in trainer.model.views
    )
    batch = (
        f"{resolved.global_batch_size} rows = {resolved.micro_batch_size} x {resolved.accumulation_steps} "
        f"micro-batches x {cluster.world_size} ranks, {tokens:,} tokens"
    )
    table = Table(title="dry run: nothing was written", show_header=False)
    for name, value in (
        ("model", f"{inputs.config.model.model} ({trainer.anatomy.architecture})"),
        ("parameters", f"{sum(torch.Size(shape).numel() for shape in shapes):,}"),
        ("protected", trainer.anatomy.in_words(trainer.method.kinds) or "nothing"),
        ("views", views),
        ("ranks", f"{cluster.world_size} ({cluster.launcher}, {cluster.device.type})"),
        ("ZeRO", f"stage {resolved.zero_stage}, {resolved.precision}"),
        ("global batch", batch),
        ("steps", f"{steps:,} = {rows:,} rows, {rows / len(inputs.corpus):.2f} epochs"),
        ("tokens", f"{steps * tokens:,}"),
        ("memory", f"{memory:.2f} GiB on the fullest rank"),
        ("first step", f"{seconds:.2f} s, compilation and warm-up included"),
    ):
        table.add_row(name, str(value))
    Console(highlight=False).print(table)
