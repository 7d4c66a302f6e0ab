"""Memory of a rank as planned and as measured, for ZeRO 0 to 3 on 1 to 4 ranks.

    python -m benchmarks.plan_accuracy DATA [--stages 0 1 2 3] [--ranks 1 2 4] [--rows 4] [--layers 12]

A RoBERTa-base-shaped random model in bf16, real gloo ranks on this machine's CPUs, the program's own trainer,
for ``mlm`` and for ``dga`` with masked updates. Without dropout, whose masks take twice the bytes on a CPU.

``held`` are the bytes of all tensors that exist between steps and did not before the model was built, counted
by their storages. ``kept`` is what a forward pass leaves for the backward pass. ``peak`` is ``held`` and the
most that torch's allocator had given out beyond it during a step. A process has a constant besides, on a CPU
as on a GPU: interpreter, libraries, communication buffers, and what malloc does not give back. It is in none
of them. Predictions are ``dga-plan``'s own.
"""

import dataclasses
import gc
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.common import corpus_of, keep_section, met_or_missed, model_of, on_ranks, options_of, table
from benchmarks.trainers import config_of, trainer_of

if TYPE_CHECKING:
    from dga_scale.planning.plan import Planner

MIB = 2**20
TARGET = 0.1
METHODS = {"mlm": ("--method", "mlm"), "dga": ("--method", "dga", "--soft_mask", "update")}


class Found(NamedTuple):
    """The bytes of a rank."""

    held: int
    kept: int
    peak: int


def measure(flags: tuple[object, ...], rows: int, stage: int) -> Found:
    """Return what this rank takes with a method."""
    import torch

    from dga_scale.zero.optimizer_hooks import backward
    from tests.helpers.engines import saved_bytes

    gc.collect()
    before = set(live_storages())
    with trainer_of(*flags, rows=rows, stage=stage) as trainer:
        batches, engine = trainer.stream(0).step(0), trainer.engine
        trainer.step(batches)
        gc.collect()
        held = sum(size for at, size in live_storages().items() if at not in before)
        loss, kept = saved_bytes(engine.module, lambda: engine(batches.micro_batches[0], batches.counts)[0])
        backward(engine, loss)
        engine.step()
        del loss
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            trainer.step(batches)
        return Found(held, kept, held + _highest(profiler))


def live_storages() -> dict[int, int]:
    """Return the bytes of all tensors' storages, by address."""
    import torch

    from tests.helpers.engines import storages

    with torch.no_grad():
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return storages(found)


def _highest(profiler: Any) -> int:
    """Return the most bytes that were allocated at once, beyond those from before."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def predicted(planner: "Planner") -> tuple[int, int, int]:
    """Return ``held``, ``kept`` and ``peak`` as the planner has them."""
    from dga_scale.config.methods.shared import soft_mask_of
    from dga_scale.planning.activations import activations
    from dga_scale.planning.memory import extras, states

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
    options = options_of(__doc__, stages=[0, 1, 2, 3], ranks=[1, 2, 4], rows=4, sequence_length=64, layers=12)
    from dga_scale.planning.gpus import GPUS  # with torch, which --help does not wait for
    from dga_scale.planning.plan import Cluster, make_planner
    from dga_scale.zero.ds_keys import load_ds_config

    length = options.sequence_length
    folders = ("--model", model_of(options.data, "roberta-base", options.layers), "--corpus",
               corpus_of(options.data, sequence_length=length), "--dropout", 0)  # fmt: skip
    accuracy = [["ZeRO", "ranks", "method"]]
    accuracy[0] += [cell for name in Found._fields for cell in (f"{name}, MiB", "predicted", "off by")]
    worst: dict[str, float] = {}
    for ranks, stage, method in itertools.product(options.ranks, options.stages, METHODS):
        flags = (*folders, *METHODS[method])
        every = on_ranks(ranks, measure, flags, options.rows, stage)
        config = config_of(*flags, rows=options.rows, ranks=ranks, stage=stage)
        machines = Cluster(ranks, ranks, GPUS["h100"])
        planner = make_planner(config, load_ds_config(str(config.run.ds_config)), machines, length)
        accuracy.append([str(stage), str(ranks), method])
        columns = map(max, zip(*every, strict=True))
        for name, real, planned in zip(Found._fields, columns, predicted(planner), strict=True):
            error = planned / real - 1
            worst[name] = max(worst.get(name, 0.0), error, key=abs)
            accuracy[-1] += [f"{real / MIB:.1f}", f"{planned / MIB:.1f}", f"{error:+.1%}"]
        print(" | ".join(accuracy[-1]), flush=True)
    met = met_or_missed(all(abs(error) <= TARGET for error in worst.values()))
    errors = ", ".join(f"{name} {error:+.1%}" for name, error in worst.items())
    said = (
        f"{options.rows} rows of {length} tokens a rank, {options.layers} layers.\n"
        f"Worst errors: {errors}. Target, all within {TARGET:.0%}: {met}."
    )
    keep_section("Memory of a rank", f"{said}\n\n{table(accuracy)}")


if __name__ == "__main__":
    main()
