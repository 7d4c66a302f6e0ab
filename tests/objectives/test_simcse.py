"""InfoNCE of two dropout draws against the formula; what of dropout it needs."""

import math

import pytest
import torch

from dga_scale.errors import UserError
from dga_scale.objectives.views import View, run_views
from tests.helpers.batches import rows_of
from tests.helpers.comparison import config_of, info_nce, loss_of, method_context, method_of, training_model
from tests.helpers.toy import toy_batch, toy_lm


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_term_is_the_formula_on_the_states_of_the_two_draws(temperature: float) -> None:
    batch = toy_batch()
    model = training_model("simcse", toy_lm(dropout=0.1), simcse_temperature=temperature)
    torch.manual_seed(5)
    loss, terms = loss_of(model, batch)
    torch.manual_seed(5)
    views = (View("mlm", masked=True), View("first"), View("second"))
    hidden = run_views(model.lm.bert, model.gates, views, batch, {}).hidden
    lengths = batch.attention_mask.sum(dim=1).tolist()
    first, second = (
        [hidden[name][row, :n].mean(dim=0) for row, n in enumerate(lengths)] for name in ("first", "second")
    )
    assert not torch.equal(first[0], second[0])
    expected = info_nce(first, second, temperature)
    assert terms["simcse"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(terms["mlm"].item() + terms["simcse"].item(), rel=1e-6)


def test_draws_that_are_alike_and_sentences_that_are_alike() -> None:
    """Without dropout the positive's cosine is 1: with all sentences the same, the loss is log(B)."""
    batch = rows_of(toy_batch(4), [0, 0, 0, 0])
    model = training_model("simcse", prepared=False)
    assert loss_of(model, batch)[1]["simcse"].item() == pytest.approx(math.log(4), rel=1e-5)


def test_a_model_without_dropout_is_refused() -> None:
    lm = toy_lm()
    lm.config.hidden_dropout_prob = lm.config.attention_probs_dropout_prob = 0.0
    lm.config.classifier_dropout = 0.3  # of a head that no LM has
    method = method_of("simcse")
    with pytest.raises(UserError, match="--dropout"):
        method.prepare(method_context(lm, config_of("simcse")))
    method.prepare(method_context(toy_lm(dropout=0.1), config_of("simcse")))
