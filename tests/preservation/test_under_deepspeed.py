"""Importance, evaluation and movement where DeepSpeed holds the parameters."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.objectives.training_model import evaluate_rows
from dga_scale.preservation.importance import measure_importance
from dga_scale.preservation.movement import MovementTracker
from dga_scale.preservation.soft_mask import GradientMask, mask_factors
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward, local_fragments
from tests.helpers.batches import counts_of, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import Reference
from tests.helpers.toy import toy_batch, toy_model, toy_protection
from tests.helpers.training import Setup, full_weights

ROWS, LEARNING_RATE = 8, 1e-3
EPSILON = 1e-2  # see tests/helpers/reference.py


def summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def measured_and_trained(stage: int) -> dict[str, Any]:
    """On each rank: importance and evaluation before and after two masked steps on its share of the rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    setup = Setup(stage=stage, clipping=0.0, epsilon=EPSILON)
    model = toy_model("dga", contrastive_weight=0.0)
    mask = GradientMask(model.lm.named_parameters(), model.anatomy)
    engine = build_engine(model, setup.resolved(ranks))
    set_learning_rate(engine, LEARNING_RATE)
    tracker = MovementTracker(model.anatomy, local_fragments(engine))
    protection = {"heads": toy_protection()}
    mask.set(mask_factors(model.anatomy, protection))

    def own(seed: int) -> Any:
        return rows_of(toy_batch(ROWS, seed=seed), slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks))

    def state() -> tuple[Tensor, Tensor]:
        values = measure_importance(engine.module, [own(0), own(1)], loss="mlm", reduce=summed).values
        return values["heads"], summed(evaluate_rows(engine.module, own(2)).sum(dim=0))

    found: dict[str, Any] = {"before": state()}
    for step in range(2):
        loss, _ = engine(own(step), counts_of(toy_batch(ROWS, seed=step), num_micro_batches=ranks))
        backward(engine, loss)
        engine.step()
    found["after"] = state()
    found["weights"] = full_weights(engine)
    effective = tracker.effective_protection(local_fragments(engine), protection, summed)
    found["movement"] = effective["heads"].movement
    return found


def expected() -> dict[str, Any]:
    """The same in one process: the plain reference trains, importance and evaluation read its weights."""
    model = toy_model("dga", contrastive_weight=0.0)
    start = {name: parameter.detach().clone() for name, parameter in model.lm.named_parameters()}
    reference = Reference(
        toy_model("mlm").lm,
        protection=toy_protection(),
        soft_mask="gradient",
        contrastive_weight=0.0,
        learning_rate=LEARNING_RATE,
        eps=EPSILON,
    )

    def state() -> tuple[Tensor, Tensor]:
        batches = [toy_batch(ROWS, seed=seed) for seed in range(3)]
        values = measure_importance(model, batches[:2], loss="mlm").values
        return values["heads"], evaluate_rows(model, batches[2]).sum(dim=0)

    found: dict[str, Any] = {"before": state()}
    for step in range(2):
        reference.step(toy_batch(ROWS, seed=step))
    model.lm.load_state_dict(reference.weights, strict=False)
    found["after"] = state()
    found["weights"] = reference.weights
    moved = []
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.attention.self.query."
        squares = [
            (reference.weights[name + leaf] - start[name + leaf]).square().view(4, -1)
            for leaf in ("weight", "bias")
        ]
        moved.append(torch.cat(squares, dim=1).mean(dim=1).sqrt())
    found["movement"] = torch.stack(moved)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_measures_and_trains_as_one_process(stage: int) -> None:
    """Ranks see their rows and get the figures of all; measuring leaves no trace in the steps around it."""
    reference = expected()
    for found in run_ranks(2, measured_and_trained, stage):
        for moment in ("before", "after"):
            importance, sums = found[moment]
            torch.testing.assert_close(importance, reference[moment][0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(sums, reference[moment][1], rtol=1e-5, atol=0)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, reference["weights"][name], rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found["movement"], reference["movement"], rtol=1e-4, atol=0)
