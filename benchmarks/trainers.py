"""The program's own trainers on a benchmark's ranks, and clocks around methods of classes."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig

if TYPE_CHECKING:
    from dga_scale.train.trainer import Trainer

WARM_UP = 2
"""The number of turns of trainers that are not counted."""
Figures = dict[str, list[float]]


def config_of(
    *flags: Any, rows: int, ranks: int, stage: int = 2, accumulation: int = 1, output: str = "none"
) -> TrainConfig:
    """Return the settings of a run under a ZeRO stage with ``rows`` rows in a micro-batch of a rank."""
    shared = {
        "ds_config": ROOT / "ds_configs" / f"zero{stage}.json",
        "output_dir": output,
        "global_batch_size": rows * ranks * accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 10_000,
    }
    return read_config([*map(str, flags), *(f"--{name}={value}" for name, value in shared.items())])


@contextmanager
def trainer_of(*flags: Any, **shape: Any) -> Iterator["Trainer"]:
    """Make a run's trainer as ``config_of`` has it, whose units are protected at random."""
    import torch

    from dga_scale.launch.world import join_cluster
    from dga_scale.logging.run_log import silent_log
    from dga_scale.train.inputs import check_inputs
    from dga_scale.train.trainer import Trainer

    cluster = join_cluster()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(*flags, ranks=cluster.world_size, output=folder, **shape)
        inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
        trainer = Trainer(inputs, cluster, silent_log())
        shapes = {kind: trainer.anatomy.unit_shape(kind) for kind in trainer.method.kinds}
        trainer.protection.set({kind: torch.rand(shape) for kind, shape in shapes.items()})
        yield trainer
        trainer.engine.destroy()


def turns(
    trainers: Mapping[str, "Trainer"], rounds: int, clock: Sequence[float] = ()
) -> tuple[Figures, Figures]:
    """Return the seconds of each trainer's steps, and those that a clock of ``inside`` ran meanwhile.

    They take turns on the same batches, each first as often as last.
    """
    seconds: Figures = {name: [] for name in trainers}
    clocked: Figures = {name: [] for name in trainers}
    names, stream = itertools.cycle(trainers), next(iter(trainers.values())).stream(0)
    for number in range(rounds + WARM_UP):
        batches = stream.step(number)
        for name in itertools.islice(names, len(trainers)):
            started, before = time.perf_counter(), sum(clock)
            trainers[name].step(batches)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
                clocked[name].append(sum(clock) - before)
        next(names)
    return seconds, clocked


@contextmanager
def inside(*methods: tuple[Any, str]) -> Iterator[list[float]]:
    """Count, within, the seconds that are spent in some methods of classes: the list's one number."""
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
