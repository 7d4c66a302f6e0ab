"""Rehearsal's weights against the two means written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.config.methods.rehearsal import RehearsalSettings
from dga_scale.corpus.loading.batches import Batch
from dga_scale.objectives.methods.rehearsal import Rehearsal
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.batches import batch_of, counts_of, dense_labels, rows_of
from tests.helpers.toy import toy_batch, toy_lm

SOURCES = torch.tensor([0, 2, 0, 1, 1, 0, 0, 2])


def mixed() -> Batch:
    batch = toy_batch(8)
    return batch_of(
        batch.input_ids, batch.masked_ids, batch.attention_mask, dense_labels(batch), sources=SOURCES
    )


def mean_loss(lm: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labels of some rows, from the stock model's full logits."""
    logits = lm(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(logits.flatten(0, 1), dense_labels(batch).flatten())


def build(weight: float | None) -> TrainingModel:
    lm = toy_lm()
    return TrainingModel(lm, anatomy_of(lm), Rehearsal(RehearsalSettings(weight))).train()


@pytest.mark.parametrize("weight", [None, 0.0, 0.7])
def test_loss_and_gradient_are_those_of_the_two_means(weight: float | None) -> None:
    batch, model, lm = mixed(), build(weight), toy_lm()
    loss, logged = model(batch, counts_of(batch, sources=3))
    loss.backward()
    domain, general = (rows_of(batch, (batch.sources > 0) == mix) for mix in (False, True))
    if weight is None:
        expected = mean_loss(lm, batch)
    else:
        expected = mean_loss(lm, domain) + weight * mean_loss(lm, general)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for source in range(3):
        own = mean_loss(lm, rows_of(batch, batch.sources == source))
        torch.testing.assert_close(logged[f"mlm/{source}"], own.detach())
    for (name, ours), theirs in zip(model.lm.named_parameters(), lm.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_parts_of_a_global_batch_add_up_also_where_one_has_no_general_text() -> None:
    batch, model = mixed(), build(0.7)
    order = torch.argsort(batch.sources, stable=True)  # the first half is all domain
    halves = [rows_of(batch, order[:4]), rows_of(batch, order[4:])]
    whole, _ = model(batch, counts_of(batch, sources=3))
    counts = counts_of(batch, sources=3, num_micro_batches=2)
    parts = [model(half, counts)[0] for half in halves]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_a_global_batch_without_general_text() -> None:
    assert Rehearsal(RehearsalSettings(0.5)).token_weights([10, 0, 0]) == (0.1, 0.5, 0.5)
    assert Rehearsal(RehearsalSettings(None)).token_weights([10, 0, 0]) == (0.1, 0.1, 0.1)
