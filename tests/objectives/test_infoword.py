"""The contrast of sentences and their masked words against the formula, row by row."""

import math

import pytest
import torch

from dga_scale.errors import UserError
from dga_scale.objectives.methods.infoword import pool_masked_words
from tests.helpers.batches import masked_places, rows_of, without_labels
from tests.helpers.comparison import (
    assert_gradients_of_mlm_and,
    config_of,
    info_nce,
    loss_of,
    method_of,
    states_of,
    training_model,
)
from tests.helpers.toy import toy_batch, toy_lm


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_term_and_gradient_are_the_references(temperature: float) -> None:
    batch, lm = toy_batch(), toy_lm()
    sentences = [states.mean(dim=0) for states in states_of(lm, batch, True)]
    clean = states_of(lm, batch, False)
    words = [states[at].mean(dim=0) for states, at in zip(clean, masked_places(batch), strict=True)]
    expected = info_nce(sentences, words, temperature)
    expected.backward()

    model = training_model("infoword", infoword_temperature=temperature)
    loss, terms = loss_of(model, batch)
    assert terms["infoword"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert_gradients_of_mlm_and(lm, model.lm, batch)


def test_sentences_that_are_alike_give_log_of_their_number() -> None:
    batch = toy_batch(4)
    batch = rows_of(batch, [0, 0, 0, 0])
    _, terms = loss_of(training_model("infoword"), batch)
    assert terms["infoword"].item() == pytest.approx(math.log(4), rel=1e-5)


def test_a_sentence_without_masked_words_is_pooled_whole() -> None:
    batch = without_labels(toy_batch(2), 0)
    hidden = torch.randn(*batch.input_ids.shape, 5)
    pooled = pool_masked_words(hidden, batch)
    length = int(batch.attention_mask[0].sum())
    torch.testing.assert_close(pooled[0], hidden[0, :length].mean(dim=0))
    torch.testing.assert_close(pooled[1], hidden[1, masked_places(batch)[1]].mean(dim=0))


def test_a_causal_model_is_refused() -> None:
    with pytest.raises(UserError, match="causal"):
        method_of("infoword").check(config_of("infoword"), causal=True)
    method_of("infoword").check(config_of("infoword"), causal=False)
