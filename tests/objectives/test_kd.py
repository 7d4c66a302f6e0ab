"""Distillation of token distributions against torch.distributions, row by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from transformers import PreTrainedModel

from dga_scale.corpus.loading.batches import Batch
from tests.helpers.batches import masked_places
from tests.helpers.comparison import (
    assert_same_gradients,
    counts_of,
    gradients_of,
    loss_of,
    training_model,
)
from tests.helpers.toy import toy_batch, toy_lm


def logits_of(lm: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Full logits (masked tokens, V) of each row on its own."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    places = masked_places(batch)
    return [lm(batch.masked_ids[None, row, :n]).logits[0, places[row]] for row, n in enumerate(lengths)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_term_and_gradient_are_the_references(temperature: float) -> None:
    batch, teacher = toy_batch(), toy_lm(seed=1).eval()
    model = training_model("kd", kd_temperature=temperature, kd_weight=0.5)
    loss, terms = loss_of(model, batch)
    loss.backward()

    lm = toy_lm()
    total = torch.zeros(())
    for ours, theirs in zip(logits_of(lm, batch), logits_of(teacher, batch), strict=True):
        student, target = Categorical(logits=ours / temperature), Categorical(logits=theirs / temperature)
        total = total + torch.distributions.kl_divergence(target, student).sum()
    expected = total * temperature**2 / counts_of(batch).num_labels
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-5)
    (terms["mlm"] + 0.5 * expected).backward()
    mlm = training_model("mlm")
    loss_of(mlm, batch)[0].backward()
    plain, distilled = gradients_of(mlm.lm), gradients_of(lm)
    assert_same_gradients(
        gradients_of(model.lm), {name: plain[name] + distilled.get(name, 0) for name in plain}
    )


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    loss, terms = loss_of(training_model("kd", teacher_seed=0), toy_batch())
    assert terms["kd"].item() == pytest.approx(0, abs=1e-7)
    assert loss.item() == pytest.approx(terms["mlm"].item(), rel=1e-6)


def test_the_teacher_reads_without_dropout_and_gets_no_gradient() -> None:
    """A student in train mode next to a teacher of its weights: what differs is the student's dropout."""
    model = training_model("kd", toy_lm(dropout=0.3))
    assert model.teacher is not None
    model.train()
    assert model.training
    assert not model.teacher.training
    loss_of(model, toy_batch())[0].backward()
    assert not gradients_of(model.teacher)


def test_fault_6_divergence_over_the_token_axis_and_reversed() -> None:
    """The released code's divergence of the same logits is another number."""
    batch, teacher, lm = toy_batch(), toy_lm(seed=1).eval(), toy_lm()
    ours, theirs = logits_of(lm, batch)[0], logits_of(teacher, batch)[0]

    def faulty(student: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(target.log_softmax(dim=0), student.softmax(dim=0), reduction="batchmean")

    right = torch.distributions.kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)).mean()
    assert (faulty(ours, theirs) - right).abs() > 0.1 * right
