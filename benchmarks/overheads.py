"""Measure the cost of DGA's parts beside a step: masks, importance, gather, GradCache, shared views.

    python -m benchmarks.overheads DATA [--shape minilm|roberta-base] [--rounds 10] [--ranks 1 2 4]

ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank. Masks, views and contrasts take turns step by
step in one process on the same batches: medians of the paired ratios, with 95% confidence intervals from the
bootstrap. Masks are measured by the clock around them too, as a difference of whole steps hardly shows a
hundredth.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import (
    ROOT,
    SHAPES,
    corpus_of,
    keep_section,
    met_or_missed,
    model_of,
    on_ranks,
    parser_of,
    ratios,
    table,
)
from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.streams import StepBatches
from dga_scale.launch.world import join_cluster
from dga_scale.logging.run_log import silent_log
from dga_scale.objectives.contrast import contrastive_loss
from dga_scale.preservation.importance import Importance, measure_importance
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from dga_scale.preservation.stepped_weights import Hook
from dga_scale.train.inputs import check_inputs
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import wrap_optimizer_step

STEPS = 2500
IMPORTANCE_ROWS = 10_000
"""A run of the papers, and the rows that its importance is measured on (``--importance_samples``)."""
GRADIENT, UPDATE, IMPORTANCE = 0.01, 0.03, 0.02
"""Targets, as shares of a step or a run."""
ACCUMULATION = 4
GLOBAL_BATCHES = (256, 32)
"""The papers', and that of ``steps.py``."""
WARM_UP = 2
GATHERS = 100
Figures = dict[str, list[float]]


def main() -> None:
    """Measure what is local to a rank on one, the contrast's gather on several."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one rank")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each variant")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes of the gather")
    options = parser.parse_args()
    rows, rounds = options.batch_size, options.rounds
    folders = (str(model_of(options.data, options.shape)), str(corpus_of(options.data)))
    (masks,) = on_ranks(1, measure_masks, *folders, rows, rounds)
    (importance,) = on_ranks(1, measure_importance_and_step, *folders, rows, rounds)
    (contrasts,) = on_ranks(1, measure_contrasts, *folders, rows, rounds)
    gathers = {ranks: on_ranks(ranks, measure_gather, *folders, rows)[0] for ranks in options.ranks}
    sections = (
        f"{rows} rows of 128 tokens a step of a rank, one thread a rank.",
        masks_table(masks),
        importance_table(importance, rows),
        contrasts_table(contrasts),
        gather_table(gathers),
    )
    keep_section(f"What DGA's parts cost, {options.shape}", "\n\n".join(sections))


# --- on the ranks ---


@contextmanager
def trainer_of(
    model: str, corpus: str, rows: int, method: str = "dga", accumulation: int = 1
) -> Iterator[Trainer]:
    """A run's trainer, whose gradient hooks stand and whose units are protected by half."""
    cluster = join_cluster()
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            [
                "--ds_config", str(ROOT / "ds_configs" / "zero2.json"), "--method", method,
                "--soft_mask", "gradient", "--model", model, "--corpus", corpus, "--output_dir", folder,
                "--global_batch_size", str(rows * cluster.world_size * accumulation),
                "--gradient_accumulation_steps", str(accumulation), "--max_steps", "10000",
            ]
        )  # fmt: skip
        inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
        trainer = Trainer(inputs, cluster, silent_log())
        anatomy = trainer.anatomy
        trainer.protection.set({k: torch.full(anatomy.unit_shape(k), 0.5) for k in trainer.method.kinds})
        yield trainer
        trainer.engine.destroy()


def turns(
    trainer: Trainer, variants: Mapping[str, Callable[[], Any]], rounds: int, clock: Sequence[float] = ()
) -> tuple[Figures, Figures]:
    """Seconds of a step in each variant, and what a clock of ``inside`` ran meanwhile.

    Variants take turns on the same batch, each first as often as last.
    """
    seconds: Figures = {name: [] for name in variants}
    clocked: Figures = {name: [] for name in variants}
    names, stream = itertools.cycle(variants), trainer.stream(0)
    for number in range(rounds + WARM_UP):
        batches = stream.step(number)
        for name in itertools.islice(names, len(variants)):
            variants[name]()
            started, before = time.perf_counter(), sum(clock)
            trainer.step(batches)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
                clocked[name].append(sum(clock) - before)
        next(names)
    return seconds, clocked


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


def measure_masks(model: str, corpus: str, rows: int, rounds: int) -> dict[str, tuple[Figures, Figures]]:
    """By method: steps without a mask, with gradient masks and update masks; the seconds inside of these."""
    found = {}
    timed = (GradientMask, "_masked"), (UpdateMask, "before_step"), (UpdateMask, "after_step")
    for method in ("dga", "das"):
        with trainer_of(model, corpus, rows, method) as trainer, inside(*timed) as clock:
            measured = importance_of(trainer, trainer.stream(0).step(0))
            factors = mask_factors(trainer.anatomy, measured.protection("clip"))
            hooks = trainer.protection._gradient_mask
            assert hooks is not None
            update = UpdateMask(trainer.anatomy, factors, trainer.method.kinds)
            masked = [False]

            def where_masked(mask: Hook, masked: list[bool] = masked) -> Hook:
                return lambda fragments: mask(fragments) if masked[0] else None

            wrap_optimizer_step(
                trainer.engine, where_masked(update.before_step), where_masked(update.after_step)
            )

            def variant(of_gradient: Any, of_update: bool, hooks: Any = hooks, masked: Any = masked) -> Any:
                def apply() -> None:
                    hooks.set(of_gradient)
                    masked[0] = of_update

                return apply

            variants = {"none": ({}, False), "gradient": (factors, False), "update": ({}, True)}
            found[method] = turns(trainer, {n: variant(*v) for n, v in variants.items()}, rounds, clock)
    return found


def importance_of(trainer: Trainer, batches: StepBatches) -> Importance:
    """Of the units that the method protects, over the micro-batches of a step."""
    rows = [batch.to(trainer.cluster.device) for batch in batches.micro_batches]
    return measure_importance(trainer.engine.module, rows, kinds=trainer.method.kinds)


def measure_importance_and_step(model: str, corpus: str, rows: int, rounds: int) -> Figures:
    """Seconds of the importance of a micro-batch, of a step on one, and of the optimizer in that step."""
    found: Figures = {"importance": [], "step": [], "optimizer": []}
    with (
        trainer_of(model, corpus, rows) as trainer,
        inside((type(trainer.engine), "step")) as optimizer,
    ):
        stream = trainer.stream(0)
        for number in range(rounds + WARM_UP):
            batches = stream.step(number)
            started = time.perf_counter()
            importance_of(trainer, batches)
            middle, before = time.perf_counter(), optimizer[0]
            trainer.step(batches)
            found["importance"].append(middle - started)
            found["step"].append(time.perf_counter() - middle)
            found["optimizer"].append(optimizer[0] - before)
    return {name: values[WARM_UP:] for name, values in found.items()}


def measure_contrasts(name: str, corpus: str, rows: int, rounds: int) -> Figures:
    """Steps of several micro-batches: the contrast of each or of all, views as in the paper or shared."""
    with trainer_of(name, corpus, rows // ACCUMULATION, accumulation=ACCUMULATION) as trainer:
        method, model, settings = trainer.method, trainer.model, trainer.method.settings

        def variant(**changes: Any) -> Callable[[], None]:
            def apply() -> None:
                method.settings = dataclasses.replace(settings, **changes)
                model.views, model.contrast = method.views(), method.contrast()

            return apply

        variants = {
            "paper": variant(contrast_scope="micro_batch", contrast_views="paper"),
            "paper, global": variant(contrast_scope="global_batch", contrast_views="paper"),
            "shared": variant(contrast_scope="micro_batch", contrast_views="shared"),
            "shared, global": variant(contrast_scope="global_batch", contrast_views="shared"),
            "plain MLM": variant(contrastive_weight=0.0),
        }
        return turns(trainer, variants, rounds)[0]


def measure_gather(model: str, corpus: str, rows: int) -> Figures:
    """Seconds of a step, and of the contrast alone, forward and backward, after a barrier.

    In a step a rank also waits in the gather for the slower ones; it would in the reduction of the gradients.
    """
    with trainer_of(model, corpus, rows) as trainer:
        steps, _ = turns(trainer, {"step": lambda: None}, 3)
        states = torch.randn(3, rows, trainer.anatomy.hidden_size).requires_grad_()
        seconds = []
        for _ in range(GATHERS):
            if trainer.cluster.world_size > 1:
                dist.barrier()
            started = time.perf_counter()
            contrastive_loss(states[0], states[1], states[2], 0.05).backward()
            seconds.append(time.perf_counter() - started)
        return steps | {"contrast": seconds[WARM_UP:]}


# --- tables ---


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the ends of its 95% interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return statistics.median(values), float(low), float(high)


def within(values: list[float], form: str) -> str:
    """Median with its interval."""
    median, low, high = (format(value, form) for value in interval(values))
    return f"{median} ({low} to {high})"


def masks_table(found: dict[str, tuple[Figures, Figures]]) -> str:
    """By method, the seconds inside masks over those of a step without, and the ratio of whole steps."""
    rows = [["soft-mask", "inside it, of a step", "target", "step / step without"]]
    for method, (steps, clock) in found.items():
        plain = statistics.median(steps["none"])
        for name, target in (("gradient", GRADIENT), ("update", UPDATE)):
            shares = [seconds / plain for seconds in clock[name]]
            met = met_or_missed(statistics.median(shares) < target)
            whole = within(ratios(steps[name], steps["none"]), ".3f")
            rows.append([f"{method} {name}", within(shares, ".2%"), f"{target:.0%}: {met}", whole])
    return table(rows)


def importance_table(found: Figures, rows_of_a_rank: int) -> str:
    """The importance of 10,000 rows, as a share of a run of 2,500 steps by global batch.

    A step of G rows is G / rows micro-batches and one step of the optimizer.
    """
    importance, step, optimizer = (statistics.median(values) for values in found.values())
    a_row = (step - optimizer) / rows_of_a_rank
    rows = [["global batch", f"importance of {IMPORTANCE_ROWS:,} rows, of {STEPS:,} steps", "target"]]
    for size in GLOBAL_BATCHES:
        share = IMPORTANCE_ROWS * importance / rows_of_a_rank / (STEPS * (a_row * size + optimizer))
        rows.append([str(size), f"{share:.2%}", f"{IMPORTANCE:.0%}: {met_or_missed(share < IMPORTANCE)}"])
    return (
        f"Importance takes {importance / rows_of_a_rank * 1e3:.1f} ms a row, forward and backward pass of a "
        f"step {a_row * 1e3:.1f} ms, the optimizer {optimizer * 1e3:.0f} ms a step.\n\n{table(rows)}"
    )


def contrasts_table(seconds: Figures) -> str:
    """Steps of several micro-batches, against DGA as in the paper with negatives of each of them."""
    rows = [[f"DGA, {ACCUMULATION} micro-batches a step", "seconds", "/ the paper's"]]
    for name, values in seconds.items():
        share = within(ratios(values, seconds["paper"]), ".3f")
        rows.append([name, f"{statistics.median(values):.3f}", share])
    return table(rows)


def gather_table(found: dict[int, Figures]) -> str:
    """The contrast's time by world size."""
    rows = [["ranks", "contrast with its gather, ms", "of a step"]]
    for ranks, figures in found.items():
        share = statistics.median(figures["contrast"]) / statistics.median(figures["step"])
        rows.append([str(ranks), within([1e3 * s for s in figures["contrast"]], ".2f"), f"{share:.2%}"])
    return table(rows)


if __name__ == "__main__":
    main()
