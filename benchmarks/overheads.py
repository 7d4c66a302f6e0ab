"""Measure the cost of DGA's parts beside a step: masks, importance, gather, GradCache, shared views.

    python -m benchmarks.overheads DATA [--shape minilm|roberta-base] [--rounds 10] [--ranks 1 2 4]

ZeRO-2 in bf16, packed rows of 128 tokens, one thread a rank. Masks, views and contrasts take turns step by
step in one process on the same batches: medians of the paired ratios, with 95% confidence intervals from the
bootstrap. Masks are measured by the clock around them too, as a difference of whole steps hardly shows a
hundredth.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

import numpy as np

from benchmarks.common import (
    SHAPES,
    corpus_of,
    keep_section,
    met_or_missed,
    model_of,
    on_ranks,
    options_of,
    ratios,
    table,
)
from benchmarks.trainers import WARM_UP, Figures, inside, trainer_of, turns

STEPS = 2500
IMPORTANCE_ROWS = 10_000
"""The rows that a run of the papers measures its importance on (``--importance_samples``)."""
MASK_TARGETS = {"gradient": 0.01, "update": 0.03}
IMPORTANCE_TARGET = 0.02
"""The target for importance, as a share of a run; those for masks are shares of a step."""
ACCUMULATION = 4
GLOBAL_BATCHES = (256, 32)
"""The papers' global batch, and that of ``steps.py``."""
GATHERS = 100
CONTRASTS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "paper, global": ("--contrast_scope", "global_batch"),
    "shared": ("--contrast_views", "shared"),
    "shared, global": ("--contrast_scope", "global_batch", "--contrast_views", "shared"),
    "plain MLM": ("--contrastive_weight", "0"),
}


def main() -> None:
    """Measure what is local to a rank on one, the contrast's gather on several."""
    options = options_of(
        __doc__, choices={"shape": SHAPES}, shape="minilm", batch_size=16, rounds=10, ranks=[1, 2, 4]
    )
    rows, rounds = options.batch_size, options.rounds
    folders = ("--model", model_of(options.data, options.shape), "--corpus", corpus_of(options.data))
    masks = [["soft-mask", "inside it, of a step", "target", "step / step without"]]
    for method in ("dga", "das"):
        masked = {mask: ("--soft_mask", mask) for mask in ("none", *MASK_TARGETS)}
        ((steps, clock),) = on_ranks(1, in_turns, (*folders, "--method", method), rows, rounds, masked)
        for mask, target in MASK_TARGETS.items():
            shares = [seconds / median(steps["none"]) for seconds in clock[mask]]
            met = f"{target:.0%}: {met_or_missed(median(shares) < target)}"
            whole = within(ratios(steps[mask], steps["none"]), ".3f")
            masks.append([f"{method} {mask}", within(shares, ".2%"), met, whole])
    (importance,) = on_ranks(1, importance_and_step, folders, rows, rounds)
    contrasts = [[f"DGA, {ACCUMULATION} micro-batches a step", "seconds", "/ the paper's"]]
    variants = {name: ("--soft_mask", "none", *flags) for name, flags in CONTRASTS.items()}
    few = rows // ACCUMULATION
    ((steps, _),) = on_ranks(1, in_turns, folders, few, rounds, variants, ACCUMULATION)
    for name, seconds in steps.items():
        contrasts.append([name, f"{median(seconds):.3f}", within(ratios(seconds, steps["paper"]), ".3f")])
    gathers = [["ranks", "contrast with its gather, ms", "of a step"]]
    for ranks in options.ranks:
        found = on_ranks(ranks, gather, folders, rows)[0]
        share = f"{median(found['contrast']) / median(found['step']):.2%}"
        gathers.append([str(ranks), within([1e3 * seconds for seconds in found["contrast"]], ".2f"), share])
    sections = (
        f"{rows} rows of 128 tokens a step of a rank, one thread a rank.",
        table(masks),
        importance_table(importance, rows),
        table(contrasts),
        table(gathers),
    )
    keep_section(f"What DGA's parts cost, {options.shape}", "\n\n".join(sections))


def in_turns(
    flags: tuple[object, ...],
    rows: int,
    rounds: int,
    variants: dict[str, tuple[object, ...]],
    accumulation: int = 1,
) -> tuple[Figures, Figures]:
    """Return the seconds of each variant's steps, and those of them that are spent inside masks."""
    from dga_scale.preservation.soft_mask import GradientMask, UpdateMask

    masks = (GradientMask, "masked"), (UpdateMask, "before_step"), (UpdateMask, "after_step")
    with inside(*masks) as clock, ExitStack() as stack:
        trainers = {
            name: stack.enter_context(trainer_of(*flags, *own, rows=rows, accumulation=accumulation))
            for name, own in variants.items()
        }
        return turns(trainers, rounds, clock)


def importance_and_step(flags: tuple[object, ...], rows: int, rounds: int) -> Figures:
    """Return the seconds of the importance of a micro-batch, of a step on it, and of the step's optimizer."""
    found: Figures = {"importance": [], "step": [], "optimizer": []}
    with trainer_of(*flags, rows=rows) as trainer, inside((type(trainer.engine), "step")) as optimizer:
        stream = trainer.stream(0)
        for number in range(rounds + WARM_UP):
            batches = stream.step(number)
            started = time.perf_counter()
            trainer.protection.measure(batches.micro_batches, model=trainer.engine.module)
            middle, before = time.perf_counter(), optimizer[0]
            trainer.step(batches)
            found["importance"].append(middle - started)
            found["step"].append(time.perf_counter() - middle)
            found["optimizer"].append(optimizer[0] - before)
    return {name: values[WARM_UP:] for name, values in found.items()}


def gather(flags: tuple[object, ...], rows: int) -> Figures:
    """Return the seconds of a step, and of the contrast alone, forward and backward, after a barrier.

    In a step a rank also waits in the gather for the slower ones; it would in the reduction of the gradients.
    """
    import torch
    import torch.distributed as dist

    from dga_scale.objectives.contrast import contrastive_loss

    with trainer_of(*flags, rows=rows) as trainer:
        steps, _ = turns({"step": trainer}, 3)
        states = torch.randn(3, rows, trainer.anatomy.hidden_size).requires_grad_()
        seconds = []
        for _ in range(GATHERS):
            if trainer.cluster.world_size > 1:
                dist.barrier()
            started = time.perf_counter()
            contrastive_loss(states[0], states[1], states[2], 0.05).backward()
            seconds.append(time.perf_counter() - started)
        return steps | {"contrast": seconds[WARM_UP:]}


def within(values: Sequence[float], form: str) -> str:
    """Format the median of values with its 95% confidence interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return f"{median(values):{form}} ({low:{form}} to {high:{form}})"


def importance_table(found: Figures, rows_of_a_rank: int) -> str:
    """Return the importance of 10,000 rows, as a share of a run of 2,500 steps by global batch.

    A step of G rows is G / rows micro-batches and one step of the optimizer.
    """
    importance, step, optimizer = (median(values) for values in found.values())
    a_row = (step - optimizer) / rows_of_a_rank
    rows = [["global batch", f"importance of {IMPORTANCE_ROWS:,} rows, of {STEPS:,} steps", "target"]]
    for size in GLOBAL_BATCHES:
        share = IMPORTANCE_ROWS * importance / rows_of_a_rank / (STEPS * (a_row * size + optimizer))
        met = met_or_missed(share < IMPORTANCE_TARGET)
        rows.append([str(size), f"{share:.2%}", f"{IMPORTANCE_TARGET:.0%}: {met}"])
    return (
        f"Importance takes {importance / rows_of_a_rank * 1e3:.1f} ms a row, forward and backward pass of a "
        f"step {a_row * 1e3:.1f} ms, the optimizer {optimizer * 1e3:.0f} ms a step.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
