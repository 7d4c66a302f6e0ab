"""Memory of a rank as planned and as measured, for ZeRO 0 to 3 on 1 to 4 ranks.

    python -m benchmarks.plan_accuracy [--stages 0 1 2 3] [--ranks 1 2 4] [--rows 4] [--sequence_length 64]

A RoBERTa-base-shaped random model in bf16, real gloo ranks on this machine's CPUs, the program's own training
model, for ``mlm`` and for ``dga`` with gates, movement tracker and masked updates. Without dropout, whose
masks take twice the bytes on a CPU.

``held`` are the bytes of all tensors that exist between steps and did not before the model was built, counted
by their storages. ``kept`` is what a forward pass leaves for the backward pass. ``peak`` is ``held`` and the
most that torch's allocator had given out beyond it during a step. A process has a constant besides, on a CPU
as on a GPU: interpreter, libraries, communication buffers, and what malloc does not give back. It is in none
of them. Predictions are ``dga-plan``'s own.
"""

import dataclasses
import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, RobertaConfig

from benchmarks.common import ROOT, keep_section, met_or_missed, on_ranks, parser_of, table
from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.loading import set_dropout
from dga_scale.config.methods.shared import soft_mask_of
from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.batches import Counts
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.objectives.methods import build_method
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.planning.activations import activations
from dga_scale.planning.gpus import GPUS
from dga_scale.planning.memory import extras, states
from dga_scale.planning.plan import Cluster, Planner, make_planner
from dga_scale.preservation.movement import MovementTracker
from dga_scale.preservation.soft_mask import UpdateMask, mask_factors
from dga_scale.zero.ds_keys import load_ds_config
from dga_scale.zero.engine import build_engine, partitioned_loading, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward, local_fragments, wrap_optimizer_step
from tests.helpers.batches import batch_of
from tests.helpers.engines import saved_bytes, storages

MIB = 2**20
TARGET = 0.1
METHODS = {"mlm": ("--method", "mlm"), "dga": ("--method", "dga", "--soft_mask", "update")}


class Shape(NamedTuple):
    """What a rank reads in a pass."""

    model: str
    rows: int
    length: int


class Found(NamedTuple):
    """Bytes of a rank."""

    held: int
    kept: int
    peak: int


def planner_of(shape: Shape, method: str, stage: int, ranks: int) -> Planner:
    """The planner of a cell."""
    path = str(ROOT / "ds_configs" / f"zero{stage}.json")
    arguments = ["--model", shape.model, "--corpus", "any", "--dropout", "0", *METHODS[method]]
    config = read_config([*arguments, "--ds_config", path, "--global_batch_size", str(shape.rows * ranks)])
    return make_planner(config, load_ds_config(path), Cluster(ranks, ranks, GPUS["h100"]), shape.length)


def measure(model: str, rows: int, length: int, method: str, stage: int) -> Found:
    """What this rank takes with a method."""
    shape = Shape(model, rows, length)
    planner = planner_of(shape, method, stage, dist.get_world_size())
    gc.collect()
    before = set(live_storages())
    engine, forward, parts = build(planner, shape)
    loss, kept = saved_bytes(engine.module, forward)
    backward(engine, loss)
    del loss
    engine.step()
    gc.collect()
    held = sum(size for at, size in live_storages().items() if at not in before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        backward(engine, forward())
        engine.step()
    peak = held + _highest(profiler)
    del parts
    engine.destroy()
    return Found(held, kept, peak)


def live_storages() -> dict[int, int]:
    """Bytes of all tensors' storages, by address."""
    with torch.no_grad():
        found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return storages(found)


def build(planner: Planner, shape: Shape) -> tuple[Any, Callable[[], Tensor], Any]:
    """What a run builds, with all that its method keeps."""
    resolved, ranks = planner.resolved(), dist.get_world_size()
    with partitioned_loading(resolved):
        lm = random_model(shape)
    anatomy, method = anatomy_of(lm), build_method(planner.config)
    model = TrainingModel(lm, anatomy, method).train()
    engine = build_engine(model, resolved)
    set_learning_rate(engine, 1e-5)
    tracker = None
    if method.kinds:
        tracker = MovementTracker(anatomy, local_fragments(engine), method.kinds)
        protection = {kind: torch.rand(anatomy.unit_shape(kind)) for kind in method.kinds}
        model.protection.set(protection)
        mask = UpdateMask(anatomy, mask_factors(anatomy, protection, "min"), method.kinds)
        wrap_optimizer_step(engine, mask.before_step, mask.after_step)
    labelled = planner.as_configured().batch.labels
    ids = torch.randint(5, anatomy.vocab_size, (shape.rows, shape.length))
    labels = ids.clone()
    labels[:, labelled:] = IGNORED
    batch = batch_of(ids, ids, torch.ones_like(ids), labels)
    assert len(batch.positions) == planner.as_configured().batch.head_positions
    counts = Counts((labelled * shape.rows * ranks,), num_micro_batches=ranks)
    return engine, lambda: engine(batch, counts)[0], tracker


def random_model(shape: Shape) -> Any:
    """The language model, no weights read."""
    config = AutoConfig.from_pretrained(shape.model)
    set_dropout(config, 0.0)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def _highest(profiler: Any) -> int:
    """The most bytes that were allocated at once, beyond those from before."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def predicted(planner: Planner) -> tuple[int, int, int]:
    """``held``, ``kept`` and ``peak`` as the planner has them."""
    plan, model = planner.as_configured(), planner.model
    # One group of weights: there is no weight decay here.
    parts = dataclasses.asdict(states(model, plan.zero, groups=False))
    if plan.zero.stage < 3:
        del parts["gradients"]  # gone after the step
    soft_mask = soft_mask_of(planner.config.method)
    held = sum(parts.values()) + sum(extras(model, plan.zero, soft_mask).values())
    width, positions = plan.zero.weight_bytes, plan.batch.head_positions
    kept = activations(model, plan.batch, width, checkpointing=False)
    kept += positions * width * (model.anatomy.vocab_size + 4 * model.anatomy.hidden_size)  # no gradients yet
    return held, kept, plan.memory.total


def main() -> None:
    """Measure and predict every stage on every number of ranks."""
    parser = parser_of(__doc__, data=False)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=4, help="rows of a rank")
    parser.add_argument("--sequence_length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    accuracy = [["ZeRO", "ranks", "method"]]
    accuracy[0] += [cell for name in Found._fields for cell in (f"{name}, MiB", "predicted", "off by")]
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        sizes: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        config = RobertaConfig(num_hidden_layers=options.layers, **sizes)
        model.write_text(json.dumps(config.to_dict()), encoding="utf-8")
        shape = Shape(str(model), options.rows, options.sequence_length)
        for ranks, stage in itertools.product(options.ranks, options.stages):
            for method in METHODS:
                every = on_ranks(ranks, measure, *shape, method, stage)
                found = Found(*(max(column) for column in zip(*every, strict=True)))
                expected = predicted(planner_of(shape, method, stage, ranks))
                accuracy.append([str(stage), str(ranks), method])
                for name, real, number in zip(Found._fields, found, expected, strict=True):
                    error = number / real - 1
                    worst[name] = max(worst.get(name, 0.0), error, key=abs)
                    accuracy[-1] += [f"{real / MIB:.1f}", f"{number / MIB:.1f}", f"{error:+.1%}"]
                print(" | ".join(accuracy[-1]), flush=True)
    met = met_or_missed(all(abs(error) <= TARGET for error in worst.values()))
    errors = ", ".join(f"{name} {error:+.1%}" for name, error in worst.items())
    said = (
        f"{options.rows} rows of {options.sequence_length} tokens a rank, {options.layers} layers.\n"
        f"Worst errors: {errors}. Target, all within {TARGET:.0%}: {met}."
    )
    keep_section("Memory of a rank", f"{said}\n\n{table(accuracy)}")


if __name__ == "__main__":
    main()
