"""KL to the base against the formula on the stock models' full logits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.methods.kl import KLSettings
from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.methods.kl import KL
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward
from tests.helpers.batches import counts_of, masked_places, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import toy_lm
from tests.helpers.training import Setup, full_weights
from tests.objectives.test_rehearsal import mean_loss, mixed

SETTINGS = KLSettings(kl_weight=0.8, kl_temperature=2.0, kl_mlm_weight=0.3)
TEACHER = 5


def build(settings: KLSettings = SETTINGS, teacher: int = TEACHER, dropout: float = 0.0) -> TrainingModel:
    lm = toy_lm()
    base = toy_lm(dropout, seed=teacher)
    return TrainingModel(lm, anatomy_of(lm), KL(settings), teacher=base).train()


def expected_kl(student: Any, base: Any, batch: Batch, temperature: float) -> Tensor:
    """Mean over the masked positions of the rows that are mixed in, one at a time."""
    divergences = []
    for row in (batch.sources > 0).nonzero().flatten().tolist():
        inputs = {
            "input_ids": batch.masked_ids[row : row + 1],
            "attention_mask": batch.attention_mask[row : row + 1],
        }
        ours, theirs = student(**inputs).logits[0], base(**inputs).logits[0].detach()
        for place in masked_places(batch)[row]:
            p = (theirs[place] / temperature).softmax(0)
            divergences.append((p * (p.log() - (ours[place] / temperature).log_softmax(0))).sum())
    return torch.stack(divergences).mean() * temperature**2


def expected_loss(student: Any, batch: Batch, settings: KLSettings = SETTINGS) -> Tensor:
    base = toy_lm(seed=TEACHER).eval()
    domain, general = (rows_of(batch, (batch.sources > 0) == mix) for mix in (False, True))
    divergence = expected_kl(student, base, batch, settings.kl_temperature)
    loss = mean_loss(student, domain) + settings.kl_weight * divergence
    if settings.kl_mlm_weight:
        loss = loss + settings.kl_mlm_weight * mean_loss(student, general)
    return loss


@pytest.mark.parametrize("settings", [SETTINGS, KLSettings()])
def test_loss_and_gradient_are_those_of_the_formula(settings: KLSettings) -> None:
    batch, model, student = mixed(), build(settings, dropout=0.4), toy_lm()
    loss, _ = model(batch, counts_of(batch, sources=3))
    loss.backward()
    expected = expected_loss(student, batch, settings)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert all(p.grad is None for p in model.teacher.parameters())
    for (name, ours), theirs in zip(model.lm.named_parameters(), student.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_student_that_is_the_base_has_no_divergence() -> None:
    batch, model = mixed(), build(teacher=0)
    loss, logged = model(batch, counts_of(batch, sources=3))
    assert abs(logged["kl"]) < 1e-6
    torch.autograd.grad(loss, model.lm.parameters(), allow_unused=True)


def test_parts_of_a_global_batch_add_up_also_where_one_has_no_general_text() -> None:
    batch, model = mixed(), build()
    order = torch.argsort(batch.sources, stable=True)
    halves = [rows_of(batch, order[:4]), rows_of(batch, order[4:])]
    _, whole = model(batch, counts_of(batch, sources=3))
    counts = counts_of(batch, sources=3, num_micro_batches=2)
    parts = [model(half, counts)[1]["kl"] for half in halves]
    assert parts[0] == 0
    torch.testing.assert_close(torch.stack(parts).mean(), whole["kl"])


def trained(stages: Sequence[int]) -> list[dict[str, Tensor]]:
    """Two steps; the first rank's rows are all of the domain."""
    batch, found = mixed(), []
    order = torch.argsort(batch.sources, stable=True)
    rank = dist.get_rank()
    own = rows_of(batch, order[4 * rank : 4 * rank + 4])
    for stage in stages:
        engine = build_engine(build(), Setup(stage, clipping=0.0, epsilon=1e-2).resolved(2))
        set_learning_rate(engine, 1e-2)
        for _ in range(2):
            loss, _ = engine(own, counts_of(batch, sources=3, num_micro_batches=2))
            backward(engine, loss)
            engine.step()
        found.append(full_weights(engine))
        engine.destroy()
    return found


def test_zero_stages_train_as_plain_pytorch() -> None:
    batch, student = mixed(), toy_lm()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        expected_loss(student, batch).backward()
        optimizer.step()
    stages = (2, 3)
    for weights in run_ranks(2, trained, stages)[0]:
        for name, expected in student.named_parameters():
            torch.testing.assert_close(weights[name], expected.detach(), rtol=0, atol=1e-5, msg=name)
