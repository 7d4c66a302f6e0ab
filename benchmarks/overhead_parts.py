"""What ``overheads.py`` runs: one process for what is local to a rank, several for the contrast's gather.

    python benchmarks/overhead_parts.py local|gather --model M --corpus C --output_dir D --rounds N ...

Rank 0 writes its figures to D/figures.json.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dga_scale.launch.world import join_cluster
from dga_scale.logging.metrics import RunLog
from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.objectives.methods import read_config
from dga_scale.objectives.views import to_device
from dga_scale.preservation.importance import measure_importance
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from dga_scale.train.inputs import check_inputs
from dga_scale.train.trainer import Session
from dga_scale.zero.optimizer_hooks import Mask, wrap_optimizer_step

WARM_UP = 2
GATHERS = 100
Figures = dict[str, list[float]]


def session_of(options: argparse.Namespace, method: str, accumulation: int = 1) -> Session:
    """A run's session, whose gradient hooks stand and whose update mask is wrapped; nothing is written."""
    cluster = join_cluster()
    rows = options.batch_size * cluster.world_size * accumulation
    config = read_config(
        [
            "--ds_config", "ds_configs/zero2.json", "--method", method, "--soft_mask", "gradient",
            "--model", options.model, "--corpus", options.corpus, "--output_dir", options.output_dir,
            "--global_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation),
            "--max_steps", "10000",
        ]
    )  # fmt: skip
    inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
    return Session(inputs, cluster, RunLog(inputs.folder.path, cluster.rank + 1, 1))


def turns(
    session: Session,
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: list[float] | None = None,
) -> tuple[Figures, Figures]:
    """Seconds of a step in each variant; they take turns on the same batch, each first as often as last.

    And what a clock of ``inside`` ran meanwhile.
    """
    seconds: Figures = {name: [] for name in variants}
    of_clock: Figures = {name: [] for name in variants}
    names, clock = itertools.cycle(variants), clock or [0.0]
    stream = session.stream(0)
    for number in range(rounds + WARM_UP):
        batches = stream.step(number)
        for name in itertools.islice(names, len(variants)):
            variants[name]()
            started, clock[0] = time.perf_counter(), 0.0
            session.train_step(batches)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
                of_clock[name].append(clock[0])
        next(names)
    return seconds, of_clock


@contextmanager
def inside(*methods: tuple[Any, str]) -> Iterator[list[float]]:
    """Within, all seconds that are spent in some methods of classes."""
    spent, originals = [0.0], {place: getattr(*place) for place in methods}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **settings)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    for place, original in originals.items():
        setattr(*place, timed(original))
    try:
        yield spent
    finally:
        for place, original in originals.items():
            setattr(*place, original)


def local(options: argparse.Namespace) -> dict[str, Any]:
    """Masks of DGA and DAS, importance, and the optimizer's share of a step."""
    found: dict[str, Any] = {}
    for method in ("dga", "das"):
        session = session_of(options, method)
        rows = [to_device(batch, session.cluster.device) for batch in session.stream(0).step(0).micro_batches]
        kinds = session.method.kinds
        measured = measure_importance(session.engine.module, rows, kinds=kinds)
        protection = measured.protection("clip")
        session.set_protection(protection)
        factors = mask_factors(session.anatomy, protection)
        found[method] = masks(session, factors, options.rounds)
        if method == "dga":
            found["importance"] = importance_and_parts(session, options.rounds)
        session.engine.destroy()
    options.batch_size //= options.passes
    found["contrast"] = contrasts(session_of(options, "dga", options.passes), options.rounds)
    return found


def masks(session: Session, factors: Any, rounds: int) -> dict[str, Any]:
    """Steps without a mask, with gradient masks and with update masks; and the seconds inside of these."""
    hooks = session._gradient_mask
    assert hooks is not None
    timed = (GradientMask, "_masked"), (UpdateMask, "before_step"), (UpdateMask, "after_step")
    with inside(*timed) as clock:
        update = UpdateMask(session.anatomy, factors, session.method.kinds)
        masked = [False]

        def where_masked(mask: Mask) -> Mask:
            return lambda fragments: mask(fragments) if masked[0] else None

        wrap_optimizer_step(session.engine, where_masked(update.before_step), where_masked(update.after_step))

        def variant(of_gradient: Any, of_update: bool) -> Callable[[], None]:
            def apply() -> None:
                hooks.set(of_gradient)
                masked[0] = of_update

            return apply

        variants = {
            "none": variant({}, False),
            "gradient": variant(factors, False),
            "update": variant({}, True),
        }
        seconds, of_masks = turns(session, variants, rounds, clock)
        variants["none"]()
    return {"steps": seconds, "inside": of_masks}


def importance_and_parts(session: Session, rounds: int) -> Figures:
    """Seconds of the importance of a micro-batch, of a step on one, and of the optimizer in that step."""
    module, stream = session.engine.module, session.stream(0)
    found: Figures = {"importance": [], "step": [], "optimizer": []}
    with inside((type(session.engine), "step")) as optimizer:
        for number in range(rounds + WARM_UP):
            batches = stream.step(number)
            rows = [to_device(batch, session.cluster.device) for batch in batches.micro_batches]
            started = time.perf_counter()
            measure_importance(module, rows, kinds=session.method.kinds)
            middle, optimizer[0] = time.perf_counter(), 0.0
            session.train_step(batches)
            figures = (middle - started, time.perf_counter() - middle, optimizer[0])
            for values, figure in zip(found.values(), figures, strict=True):
                values.append(figure)
    return {name: values[WARM_UP:] for name, values in found.items()}


def contrasts(session: Session, rounds: int) -> Figures:
    """Steps of several passes: the contrast of each or of all of them, readings as in the paper or shared."""
    shapes = {
        kind: (session.anatomy.num_layers, session.anatomy.units(kind)) for kind in session.method.kinds
    }
    session.set_protection({kind: torch.full(shape, 0.5) for kind, shape in shapes.items()})
    settings = session.method.settings

    def variant(scope: str, views: str) -> Callable[[], None]:
        changed = dataclasses.replace(settings, contrast_scope=scope, contrast_views=views)
        return lambda: setattr(session.method, "settings", changed)

    return turns(
        session,
        {
            "paper": variant("micro_batch", "paper"),
            "paper, global": variant("global_batch", "paper"),
            "shared": variant("micro_batch", "shared"),
            "shared, global": variant("global_batch", "shared"),
            "plain MLM": lambda: setattr(
                session.method, "settings", dataclasses.replace(settings, contrastive_weight=0.0)
            ),
        },
        rounds,
    )[0]


def gather(options: argparse.Namespace) -> Figures:
    """Seconds of a step, and of the contrast alone, forward and backward, after a barrier.

    In a step a rank also waits in the gather for the slower ones; it would in the reduction of the gradients.
    """
    session = session_of(options, "dga")
    shapes = {
        kind: (session.anatomy.num_layers, session.anatomy.units(kind)) for kind in session.method.kinds
    }
    session.set_protection({kind: torch.full(shape, 0.5) for kind, shape in shapes.items()})
    steps, _ = turns(session, {"step": lambda: None}, options.rounds)
    states = torch.randn(3, options.batch_size, session.anatomy.hidden_size).requires_grad_()
    seconds = []
    for _ in range(GATHERS):
        if session.cluster.world_size > 1:
            dist.barrier()
        started = time.perf_counter()
        contrastive_loss(states[0], states[1], states[2], 0.05).backward()
        seconds.append(time.perf_counter() - started)
    return steps | {"contrast": seconds[WARM_UP:]}


def main() -> None:
    """Run one part on this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["local", "gather"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True, help="rows of one step of one rank")
    parser.add_argument(
        "--passes", type=int, default=1, help="of a step, to compare contrasts of all of them"
    )
    parser.add_argument("--local_rank", type=int, default=-1)
    options = parser.parse_args()
    # DeepSpeed would compile a shared-memory operation for CPUs, which only inference calls: 40 s.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    found = {"local": local, "gather": gather}[options.part](options)
    if join_cluster().rank == 0:
        path = Path(options.output_dir) / "figures.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
