"""Predicted memory of a rank against real engines, for ZeRO 0 to 3 on 1, 2 and 4 ranks of this machine.

    python -m benchmarks.plan_accuracy MODEL_FOLDER [--ranks 1 2 4] [--rows 8] [--sequence_length 128]

One masked-LM run of the program's own training model in bf16 for each cell: ``states`` are the bytes of all
weights, masters, moments and kept gradients between steps; ``kept`` is what a forward pass leaves for the
backward pass; ``peak`` is the most that torch's allocator had given out during a
step. Without dropout, whose masks take twice the bytes on a CPU. Predictions are ``dga-plan``'s own.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.results import append_section
from dga_scale.backbone.loading import load_model
from dga_scale.engine.deepspeed import build_engine, partitioned_loading, set_learning_rate
from dga_scale.engine.ds_keys import load_ds_config
from dga_scale.engine.optimizer_step import backward
from dga_scale.objectives import build_method, read_config
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.planning.gpus import GPUS
from dga_scale.planning.memory import activations, states
from dga_scale.planning.plan import Cluster, Planner, make_planner
from tests.planning.engines import held_bytes, saved_bytes
from tests.ranks import close_pools, run_ranks

FIGURES = ("states", "kept", "peak")
CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def make(model: str, stage: int, ranks: int, rows: int, length: int) -> Planner:
    """The planner of a cell."""
    path = str(CONFIGS / f"zero{stage}.json")
    arguments = ["--model", model, "--corpus", "any", "--method", "mlm", "--dropout", "0"]
    config = read_config([*arguments, "--ds_config", path, "--global_batch_size", str(rows * ranks)])
    return make_planner(config, load_ds_config(path), Cluster(ranks, ranks, GPUS["h100"]), length)


def measure(model: str, stage: int, rows: int, length: int) -> tuple[int, int, int]:
    """Bytes of a rank: states, kept between the passes, and the peak of a step."""
    ranks = dist.get_world_size()
    planner = make(model, stage, ranks, rows, length)
    resolved = planner.resolved()
    with partitioned_loading(resolved):
        loaded = load_model(model, dropout=0.0)
    engine = build_engine(
        TrainingModel(loaded.model, loaded.anatomy, build_method(planner.config)).train(), resolved
    )
    set_learning_rate(engine, 1e-5)
    plan = planner.as_configured()
    ids = torch.randint(5, loaded.anatomy.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    positions = mask.cumsum(dim=1).le(plan.batch.labels).flatten().nonzero().flatten()
    labels = ids.flatten()[positions]
    masked = (plan.batch.labels * rows * ranks,)

    def forward() -> torch.Tensor:
        return engine(ids, ids, mask, positions, labels, masked=masked, passes=float(ranks))[0]

    loss, kept = saved_bytes(engine.module, forward)
    backward(engine, loss)
    engine.step()
    held = sum(held_bytes(engine).values())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        backward(engine, forward())
        engine.step()
    return held, kept, held + _highest(profiler)


def _highest(profiler: Any) -> int:
    """The most bytes that were allocated at once, beyond those from before."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a masked LM")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=8, help="rows of a rank")
    parser.add_argument("--sequence_length", type=int, default=128)
    options = parser.parse_args()
    shape = (options.rows, options.sequence_length)
    lines = [
        "| ZeRO | ranks " + "".join(f"| {name}, MiB | predicted | off by " for name in FIGURES) + "|",
        f"|{'---|' * 11}",
    ]
    for stage in range(4):
        for ranks in options.ranks:
            close_pools()  # each cell in processes of its own
            results = run_ranks(ranks, measure, options.model, stage, *shape, timeout=300.0)
            held, kept, peak = (max(column) for column in zip(*results, strict=True))
            planner = make(options.model, stage, ranks, *shape)
            plan = planner.as_configured()
            parts = dataclasses.asdict(states(planner.model, plan.zero, groups=False))
            if stage < 3:
                del parts["gradients"]  # gone after the step
            expected = sum(parts.values())
            width = plan.zero.weight_bytes
            between = activations(planner.model, plan.batch, width, checkpointing=False)
            positions, anatomy = plan.batch.rows * plan.batch.labels, planner.model.anatomy
            between += positions * 4 * (anatomy.vocab_size + width * anatomy.hidden_size)  # no gradients yet
            figures = [
                *(held / 2**20, expected / 2**20, f"{expected / held - 1:+.1%}"),
                *(kept / 2**20, between / 2**20, f"{between / kept - 1:+.1%}"),
                *(peak / 2**20, plan.memory.total / 2**20, f"{plan.memory.total / peak - 1:+.1%}"),
            ]
            cells = [f if isinstance(f, str) else f"{f:.1f}" for f in figures]
            lines.append(f"| {stage} | {ranks} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    append_section("Planned memory", "\n".join(lines), " ".join(["python -m", *sys.argv]))


if __name__ == "__main__":
    from benchmarks import plan_accuracy  # the ranks find ``measure`` by the module's own name

    plan_accuracy.main()
