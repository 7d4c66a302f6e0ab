"""Soft-masks under every way to run DeepSpeed against plain PyTorch: the cells and their runner."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.methods.dga import DGASettings
from dga_scale.objectives.methods.dga import DGA
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from dga_scale.zero.engine import build_engine, global_grad_norm, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward, wrap_optimizer_step
from tests.helpers.batches import counts_of, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import Reference
from tests.helpers.toy import HEADS, LAYERS, toy_batch, toy_lm
from tests.helpers.training import Setup, full_weights

ROWS = 16
LEARNING_RATES = (1e-3, 2e-3, 5e-4)
WEIGHT_DECAY = 0.1
CLIPPING = 0.5
# Large beside the rounding noise of gradients that are zero in exact arithmetic (a key projection's bias),
# which Adam would otherwise blow up to full steps; and so that a mask on the gradient shows at all.
EPSILON = 1e-2


@dataclass(frozen=True, order=True)
class Cell:
    """One way to run."""

    mode: str
    stage: int
    offload: bool
    precision: str
    accumulation: int
    clipping: bool
    checkpointing: bool
    world_size: int

    def __str__(self) -> str:
        marks = ["offload"] * self.offload + ["clipping"] * self.clipping + ["recompute"] * self.checkpointing
        return (
            f"{self.mode:8} ZeRO-{self.stage} {self.precision} x{self.accumulation} "
            f"ranks {self.world_size} {' '.join(marks)}"
        ).strip()

    @property
    def setup(self) -> Setup:
        return Setup(
            self.stage,
            self.precision,
            self.offload,
            self.accumulation,
            CLIPPING if self.clipping else 0.0,
            WEIGHT_DECAY,
            EPSILON,
            ROWS,
            sub_group_size=2000 if self.stage == 3 else None,
        )


def all_cells(world_sizes: Iterable[int] = (1, 2, 4)) -> list[Cell]:
    """Every combination that exists; ZeRO-0 has nothing to offload."""
    product = itertools.product(
        ("gradient", "update"),
        (0, 1, 2, 3),
        (False, True),
        ("fp32", "bf16"),
        (1, 4),
        (False, True),
        (False, True),
        world_sizes,
    )
    return [cell for cell in itertools.starmap(Cell, product) if cell.stage or not cell.offload]


def covering_cells() -> list[Cell]:
    """Choose, greedily, a small set in which every two values of any two factors meet that can meet."""
    cells = all_cells()
    missing = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(missing & _pairs(cell)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[Any]:
    values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
    return set(itertools.combinations(values, 2))


def protection() -> Tensor:
    """``a`` (layers, heads) with all of free, half, nearly and wholly protected heads."""
    a = torch.tensor([[0.0, 0.5, 0.9, 1.0], [1.0, 0.0, 0.25, 0.75]])
    assert a.shape == (LAYERS, HEADS)
    return a


@dataclass(frozen=True)
class Outcome:
    """After the steps: the optimizer's weights, the gradient norm of each step, the loss of each."""

    weights: dict[str, Tensor]
    norms: list[float]
    losses: list[float]


def run_cell(cell: Cell, from_zero_init: bool = False) -> Outcome:
    """Run a cell, on every rank of its group."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    resolved = cell.setup.resolved(ranks)
    lm = _partitioned_lm(resolved.ds_config) if from_zero_init else toy_lm()
    anatomy = anatomy_of(lm)
    model = TrainingModel(lm, anatomy, DGA(DGASettings())).train()
    if cell.checkpointing:
        model.enable_gradient_checkpointing()
    factors = mask_factors(anatomy, {"heads": protection()})
    gradient_mask = None
    if cell.mode == "gradient":
        gradient_mask = GradientMask(lm.named_parameters(), anatomy)
    engine = build_engine(model, resolved)
    model.protection.set({"heads": protection()})
    if gradient_mask:
        gradient_mask.set(factors)
    else:
        mask = UpdateMask(anatomy, factors)
        wrap_optimizer_step(engine, mask.before_step, mask.after_step)
    norms, losses = [], []
    micro = resolved.micro_batch_size
    for step, learning_rate in enumerate(LEARNING_RATES):
        batch = toy_batch(ROWS, seed=step)
        counts = counts_of(batch, num_micro_batches=ranks * cell.accumulation)
        set_learning_rate(engine, learning_rate)
        total = torch.zeros(())
        for index in range(cell.accumulation):
            start = (index * ranks + rank) * micro
            own = rows_of(batch, slice(start, start + micro))
            loss, _ = engine(own, counts)
            total += loss.detach() / (ranks * cell.accumulation)
            backward(engine, loss)
            engine.step()
        torch.distributed.all_reduce(total)
        norms.append(float(global_grad_norm(engine)))
        losses.append(total.item())
    outcome = Outcome(full_weights(engine), norms, losses)
    engine.destroy()
    return outcome


def _partitioned_lm(ds_config: dict[str, Any]) -> nn.Module:
    """``toy_lm`` built under ``zero.Init``: no rank ever holds a whole parameter."""
    with deepspeed.zero.Init(config_dict_or_path=ds_config), no_init_weights():
        lm = toy_lm()
    lm.tie_weights()
    assert all(parameter.numel() == 0 for parameter in lm.parameters())
    for parameter, content in zip(lm.parameters(), toy_lm().parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(content)
    return lm


def run_cells(cells: Sequence[Cell], from_zero_init: bool = False) -> list[Outcome]:
    """Run cells one after the other, on every rank; only rank 0's weights are returned."""
    outcomes = [run_cell(cell, from_zero_init) for cell in cells]
    if torch.distributed.get_rank() > 0:
        return [Outcome({}, outcome.norms, outcome.losses) for outcome in outcomes]
    return outcomes


@lru_cache
def reference(mode: str, precision: str, clipping: bool, accumulation: int) -> Outcome:
    """What plain PyTorch gives: one process, the whole global batch."""
    run = Reference(
        toy_lm(),
        protection=protection(),
        soft_mask=mode,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        decays=lambda name: name.endswith("weight") and "LayerNorm" not in name,
        max_grad_norm=CLIPPING if clipping else None,
        compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    norms, losses = [], []
    for step, learning_rate in enumerate(LEARNING_RATES):
        # Rows see each other as negatives within one forward pass of all ranks.
        figures = run.step(
            toy_batch(ROWS, seed=step), learning_rate=learning_rate, contrast_rows=ROWS // accumulation
        )
        norms.append(figures.grad_norm)
        losses.append(figures.loss)
    return Outcome({name: w.detach() for name, w in run.weights.items()}, norms, losses)


@lru_cache
def start() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in toy_lm().named_parameters()}


def largest_deviation(ours: Outcome, theirs: Outcome) -> float:
    """Largest absolute difference of any weight."""
    assert ours.weights.keys() == theirs.weights.keys()
    return max((ours.weights[n] - w).abs().max().item() for n, w in theirs.weights.items())


def relative_deviation(ours: Outcome, theirs: Outcome) -> float:
    """Length of the difference over the length of the movement, over all weights."""
    difference = sum((ours.weights[n] - w).double().square().sum() for n, w in theirs.weights.items())
    movement = sum((w - start()[n]).double().square().sum() for n, w in theirs.weights.items())
    return (difference / movement).sqrt().item()


def norm_deviation(ours: Outcome, theirs: Outcome) -> float:
    """Largest relative difference of a step's gradient norm."""
    return max(abs(a - b) / b for a, b in zip(ours.norms, theirs.norms, strict=True))


def bf16_noise(cell: Cell) -> float:
    """How far bf16 alone takes the reference from its fp32 self."""
    half, full = (reference(cell.mode, p, cell.clipping, cell.accumulation) for p in ("bf16", "fp32"))
    return relative_deviation(half, full)


def expected(cell: Cell) -> Outcome:
    return reference(cell.mode, cell.precision, cell.clipping, cell.accumulation)


def run_on_ranks(cells: Sequence[Cell], from_zero_init: bool = False) -> dict[Cell, Outcome]:
    """Run cells on real ranks: one call for each world size."""
    outcomes = {}
    for world_size in sorted({cell.world_size for cell in cells}):
        own = [cell for cell in cells if cell.world_size == world_size]
        found = run_ranks(world_size, run_cells, own, from_zero_init, timeout=60 + 20 * len(own))[0]
        outcomes |= dict(zip(own, found, strict=True))
    return outcomes
