"""What holds for all comparison methods with a loss: padding, micro-steps and ranks change nothing."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.errors import UserError
from dga_scale.objectives.training_model import TrainingModel
from tests.helpers.batches import rows_of
from tests.helpers.comparison import (
    assert_same_gradients,
    config_of,
    counts_of,
    gradients_of,
    loss_of,
    method_context,
    method_of,
    training_model,
    wider,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY
from tests.helpers.toy import toy_batch

METHODS = ("kd", "simcse", "tacl", "infoword", "adapted_deit")
MEANS = ("kd", "tacl", "adapted_deit")
"""Without negatives of other rows: micro-steps of a global batch change nothing either."""
ROWS = 8

Found = tuple[float, dict[str, Tensor]]


def found(name: str, micro_steps: int = 1, rank: int = 0, ranks: int = 1) -> Found:
    """The term's mean over micro-steps, and the gradient of the model and of the method's parameters."""
    batch = toy_batch(ROWS)
    model = training_model(name, prepared=name != "simcse")
    size, term = ROWS // (ranks * micro_steps), 0.0
    for step in range(micro_steps):
        start = (step * ranks + rank) * size
        own = rows_of(batch, slice(start, start + size))
        loss, terms = loss_of(model, own, counts_of(batch, num_micro_batches=ranks * micro_steps))
        (loss / micro_steps).backward()
        term += terms[name].item() / micro_steps
    return term, gradients_of(model)


@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing(name: str) -> None:
    model = training_model(name, prepared=name != "simcse")
    batch = toy_batch()
    _, terms = loss_of(model, batch)
    _, padded = loss_of(model, wider(batch, 5))
    assert padded[name].item() == pytest.approx(terms[name].item(), rel=1e-5)


@pytest.mark.parametrize("name", MEANS)
def test_micro_steps_have_the_gradient_of_the_global_batch(name: str) -> None:
    """Rows differ in their number of masks, so a mean of micro-steps' means would be another loss."""
    (term, gradients), (expected_term, expected) = found(name, 4), found(name)
    assert term == pytest.approx(expected_term, rel=1e-5)
    assert_same_gradients(gradients, expected)


def on_rank(names: tuple[str, ...]) -> list[Found]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = []
    for name in names:
        term, gradients = found(name, rank=rank, ranks=ranks)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= ranks
        parts.append((term, gradients))
    return parts


def test_ranks_have_the_gradient_of_the_global_batch() -> None:
    """Two ranks of four rows each, with the negatives of all, against one process with all eight."""
    by_rank = run_ranks(2, on_rank, METHODS)
    for number, name in enumerate(METHODS):
        expected_term, expected = found(name)
        terms, gradients = zip(*(part[number] for part in by_rank), strict=True)
        assert sum(terms) / 2 == pytest.approx(expected_term, rel=1e-5), name
        for each in gradients:
            assert_same_gradients(each, expected)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_takes_every_loss(name: str) -> None:
    """A finite loss with a gradient; masked and causal batches read alike here."""
    for method in (*METHODS, "taco"):
        lm = TINY[name].model(random_biases=False)
        made = method_of(method)
        if (name, method) == ("opt narrow", "taco"):
            with pytest.raises(UserError, match="hidden_size 32, word_embed_proj_dim 24"):
                made.prepare(method_context(lm, config_of(method)))
            continue
        if method != "simcse":
            made.prepare(method_context(lm, config_of(method)))
        teacher = TINY[name].model() if made.needs_teacher else None
        model = TrainingModel(lm, anatomy_of(lm), made, teacher=teacher)
        loss, terms = loss_of(model, toy_batch(4))
        loss.backward()
        assert terms[method].item() > 0, method
        assert all(gradient.isfinite().all() for gradient in gradients_of(model).values()), method


def test_a_weight_of_zero_leaves_the_lm_loss() -> None:
    torch.manual_seed(0)
    for name, weight in (("kd", "kd_weight"), ("tacl", "tacl_weight"), ("adapted_deit", "deit_weight")):
        loss, terms = loss_of(training_model(name, **{weight: 0.0}), toy_batch())
        assert loss.item() == terms["mlm"].item()
