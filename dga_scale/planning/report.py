"""Report a plan to people (tables) and to programs (JSON)."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from dga_scale.planning.cost import collective
from dga_scale.planning.gpus import Gpu
from dga_scale.planning.plan import GIB, Plan, Planner
from dga_scale.preservation.jackknife import GROUPS

DAY = 86400

PURPOSES = {
    "weights": "the model's, in the precision of the forward passes",
    "master weights": "the fp32 copy that the optimizer steps",
    "moments": "the optimizer's state of each entry, fp32",
    "teacher": "a frozen copy of the starting model",
    "weight_regularisation": "the starting weights, and the Fisher where there is one, fp32",
    "movement": "the protected rows as they started, to measure how far they move",
    "gradients": "at the moment of the peak",
    "gathered weights": "whole weights that ZeRO-3 has gathered at once",
    "activations": "kept by the forward passes for the backward pass",
    "keys of the contrast": "pooled states of all ranks' rows, which the contrast compares",
    "logits": "of the labelled positions, over the vocabulary",
    "buckets": "gradients collected for one call, and the copies made to reduce them",
    "work on a block": "intermediate results of one block's backward pass",
    "fp32 gradients of the step": "gradients as the optimizer takes them",
    "masked weights of the step": "weights kept aside while the soft-mask scales their update",
    "copy for a save": "what --async_save writes in the background",
}
"""The purposes of a rank's memory (``memory``), with what they are."""


def as_json(planner: Planner, plan: Plan, recommended: Plan | None) -> dict[str, Any]:
    """Return all results of a plan as JSON data, in bytes and seconds."""
    cluster = planner.cluster
    return {
        "model": planner.model.name,
        "parameters": planner.model.parameters,
        "trained_parameters": planner.model.trained_parameters,
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.per_node,
        "gpu": dataclasses.asdict(cluster.gpu),
        "sequence_length": planner.length,
        "max_steps": planner.config.optimization.max_steps,
        "room_bytes": round(cluster.room),
        "planned": _plan_as_json(planner, plan),
        "recommended": None if recommended is None else _plan_as_json(planner, recommended),
    }


def _plan_as_json(planner: Planner, plan: Plan) -> dict[str, Any]:
    steps = planner.config.optimization.max_steps
    return {
        **dataclasses.asdict(plan.choice),
        "accumulation": plan.accumulation,
        "fits": plan.fits,
        "device_bytes": plan.memory.device,
        "host_bytes": plan.memory.host,
        "traffic_bytes": dataclasses.asdict(plan.traffic),
        "seconds": {**dataclasses.asdict(plan.time), "step": plan.time.step, "run": steps * plan.time.step},
        "mfu": plan.mfu,
        "tokens_per_step": _tokens(plan),
    }


def scaling_as_json(planner: Planner) -> list[dict[str, Any]]:
    """Return weak scaling as JSON data: one entry for each number of GPUs and stage."""
    return [
        {"gpus": gpus, **_plan_as_json(planner, plan)} for gpus, plans in planner.scaling() for plan in plans
    ]


def _tokens(plan: Plan) -> int:
    return plan.batch.tokens * plan.accumulation * plan.zero.ranks


def print_plan(planner: Planner, plan: Plan, recommended: Plan | None) -> None:
    """Print memory and time of the plan and of the recommendation side by side, and what does not fit."""
    columns = {"as configured": plan}
    if recommended is not None and recommended.choice != plan.choice:
        columns["recommended"] = recommended
    console = _console()
    console.print(Group(_overview(planner, columns), _memory(planner, columns)))
    for line in _summary(planner, plan, recommended):
        console.print(line, soft_wrap=True)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:  # in a pipe rich would wrap at 80 columns
        console.width = 160
    return console


def _overview(planner: Planner, columns: dict[str, Plan]) -> Table:
    model, gpu = planner.model, planner.cluster.gpu
    table = Table(title=f"{model.name}: {model.parameters / 1e6:,.1f} M parameters, "
                  f"{planner.cluster.gpus} GPUs, --method {model.method.name}")  # fmt: skip
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    steps = planner.config.optimization.max_steps
    rows: dict[str, list[str]] = {
        "ZeRO stage": [str(p.choice.stage) for p in columns.values()],
        "activations recomputed (--gradient_checkpointing)": [
            "yes" if p.choice.checkpointing else "no" for p in columns.values()
        ],
        "rows: micro-batch x accumulation x GPUs": [
            f"{p.batch.rows} x {p.accumulation} x {p.zero.ranks}" for p in columns.values()
        ],
        f"traffic a step and rank, {planner.length} tokens a row": [
            _size(p.traffic.total) for p in columns.values()
        ],
        "  of it keys of the contrast": [_size(p.traffic.contrast) for p in columns.values()],
        f"step ({_assumed(gpu)})": [_duration(p.time.step) for p in columns.values()],
        "  forward and backward": [_duration(p.time.compute) for p in columns.values()],
        "  optimizer": [_duration(p.time.optimizer) for p in columns.values()],
        "  waiting for communication": [_duration(p.time.exposed) for p in columns.values()],
        "  transfers to and from the host (offload)": [_duration(p.time.host) for p in columns.values()],
        "MFU of the step (matrix FLOP/s over the peak)": [f"{p.mfu:.1%}" for p in columns.values()],
        "tokens/s": [f"{_tokens(p) / p.time.step:,.0f}" for p in columns.values()],
        f"{steps:,} steps": [_duration(steps * p.time.step) for p in columns.values()],
        "  tokens": [f"{steps * _tokens(p):,}" for p in columns.values()],
        "  GPU-hours": [
            f"{steps * p.time.step * planner.cluster.gpus / 3600:,.1f}" for p in columns.values()
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _assumed(gpu: Gpu) -> str:
    """Describe the assumption behind the compute time."""
    if gpu.mfu:
        return f"forward and backward at {gpu.mfu:.0%} MFU, as given"
    return (
        f"assumed: matrix products at {gpu.product_efficiency:.0%}, "
        f"memory at {gpu.memory_efficiency:.0%} of the peak"
    )


def _memory(planner: Planner, columns: dict[str, Plan]) -> Table:
    table = Table(title="peak memory of a rank")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("what it is")
    for where in ("device", "host"):
        sizes = [getattr(plan.memory, where) for plan in columns.values()]
        for name in dict.fromkeys(name for column in sizes for name in column):
            label = name if where == "device" else f"host: {name}"
            table.add_row(label, *(_size(column.get(name, 0)) for column in sizes), PURPOSES[name])
    table.add_section()
    table.add_row("all", *(_size(plan.memory.total) for plan in columns.values()))
    table.add_row("usable on the GPU", *(_size(planner.cluster.room) for _ in columns))
    table.add_row("", *("fits" if plan.fits else "does not fit" for plan in columns.values()))
    return table


def _summary(planner: Planner, plan: Plan, recommended: Plan | None) -> Iterable[str]:
    cluster = planner.cluster
    if not plan.fits:
        over = plan.memory.total - cluster.room
        if over > 0:
            largest = max(plan.memory.device, key=lambda name: plan.memory.device[name])
            yield f"As configured it does not fit: {_size(over)} too much on a GPU, most of it {largest}."
        if plan.memory.host_total > cluster.host_room:
            yield (
                f"The host has {_size(cluster.host_room)} for each GPU, offload takes "
                f"{_size(plan.memory.host_total)}."
            )
    if recommended is None:
        least = planner.smallest().memory.total
        yield (
            f"Nothing fits: a row under ZeRO-3, all recomputed, takes {_size(least)} of "
            f"{_size(cluster.room)}. "
            "Offload (ds_configs/zero3_offload.json), shorter rows or larger GPUs help."
        )
    elif recommended.choice != plan.choice:
        choice = recommended.choice
        offload = "_offload" if recommended.zero.offload_parameters else ""
        yield (
            f"Recommended: a ZeRO-{choice.stage} JSON (ds_configs/zero{choice.stage}{offload}.json), "
            f"--per_device_train_batch_size {choice.micro_batch} "
            f"--gradient_accumulation_steps {recommended.accumulation}"
            + (" --gradient_checkpointing true" if choice.checkpointing else "")
        )
    contrast = planner.model.method.contrast()
    by_pass = contrast is not None and contrast.scope == "micro_batch"
    if recommended is not None and by_pass and recommended.batch.rows != plan.batch.rows:
        yield (
            "A contrast's negatives are the rows of a micro-batch on all ranks: another size changes them. "
            "--contrast_scope global_batch uses those of the whole step."
        )
    yield "Not in it: evaluation, checkpoints, measuring importance, reading the model."


def print_scaling(planner: Planner) -> None:
    """Print the share of a step spent waiting for communication, by GPUs and stage, and the contrast's."""
    table = Table(title="weak scaling on paper: share of a step spent waiting for communication")
    table.add_column("GPUs", justify="right")
    columns_made, matters = False, None
    for gpus, plans in planner.scaling():
        if not columns_made:
            for plan in plans:
                table.add_column(f"ZeRO-{plan.choice.stage}", justify="right")
            table.add_column("contrast's keys a step", justify="right")
            table.add_column("their share of a step", justify="right")
            columns_made = True
        last = plans[-1]
        # The lowest stage waits least for the rest, so there the contrast weighs most.
        share = plans[0].time.contrast / plans[0].time.step
        if matters is None and share > MATTERS:
            matters = gpus
        shares = (f"{plan.time.communication_share:.1%}" for plan in plans)
        table.add_row(f"{gpus:,}", *shares, _size(last.traffic.contrast), f"{share:.2%}")
    console = _console()
    console.print(table)
    if last.traffic.contrast:
        where = f"from {matters:,} GPUs on" if matters else "nowhere up to 1,024 GPUs"
        console.print(f"The contrast's gathers take more than {MATTERS:.0%} of a step {where}.")
    for line in (*_importance(planner, plans[0]), FORMULAS):
        console.print(line, soft_wrap=True)


def _importance(planner: Planner, plan: Plan) -> Iterable[str]:
    """Describe the all-reduce after importance is measured, on as many GPUs as ``plan`` has."""
    model, cluster = planner.model, planner.cluster
    kinds = model.method.kinds
    if kinds:
        # Sums in fp64, and in fp32 those of the groups that standard errors come from.
        size = (8 + 4 * GROUPS) * sum(math.prod(model.anatomy.unit_shape(kind)) for kind in kinds)
        ranks, calls = plan.zero.ranks, 4 + 2 * len(kinds)
        seconds = collective(2 * size, calls, cluster.gpu, ranks, cluster.per_node, all_reduce=True)
        yield (
            f"Importance is reduced once a run, {_size(size)} in {calls} calls: {_duration(seconds)} on "
            f"{ranks:,} GPUs, {seconds / plan.time.step:.1%} of one step."
        )


FORMULAS = """\
Of S bytes over N ranks, a rank sends S (N-1)/N in an all-gather or reduce-scatter, twice that in an all-
reduce (ZeRO, arXiv 1910.02054, section 7), over NVLink in a machine, its network cards between machines.
Each call also waits for the latency of its hops: N-1 in a ring, twice that in a ring's all-reduce, 2 log2 N
in a tree's, with the protocol that is fastest (NCCL's own cost model, src/graph/tuning.cc). ZeRO-1 and 2
all-reduce gradients, with the gather of weights three times the parameters in all, as DeepSpeed does by
default (use_multi_rank_bucket_allreduce)."""
"""The formulas behind the shares; ``cost.py`` has more details."""

MATTERS = 0.01
"""The share of a step above which the contrast's gathers are reported to matter."""


def _size(number: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1024:,.1f} KiB" if number else "-"


def _duration(seconds: float) -> str:
    for unit, size in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
