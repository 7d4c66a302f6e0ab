"""The contrast of masked tokens against the formula, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from dga_scale.errors import UserError
from tests.helpers.batches import masked_places
from tests.helpers.comparison import (
    assert_same_gradients,
    config_of,
    counts_of,
    gradients_of,
    loss_of,
    method_of,
    states_of,
    training_model,
)
from tests.helpers.toy import toy_batch, toy_lm


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_term_and_gradient_are_the_references(temperature: float) -> None:
    batch, lm, teacher = toy_batch(), toy_lm(), toy_lm(seed=1).eval()
    total = torch.zeros(())
    rows = zip(
        states_of(lm, batch, True), states_of(teacher, batch, False), masked_places(batch), strict=True
    )
    for ours, theirs, places in rows:
        for i in places:
            cosines = torch.stack([F.cosine_similarity(ours[i], state, dim=0) for state in theirs.detach()])
            total = total + torch.logsumexp(cosines / temperature, 0) - cosines[i] / temperature
    expected = total / counts_of(batch).num_labels
    expected.backward()

    model = training_model("tacl", tacl_temperature=temperature, tacl_weight=3.0)
    loss, terms = loss_of(model, batch)
    assert terms["tacl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(terms["mlm"].item() + 3 * terms["tacl"].item(), rel=1e-6)
    loss.backward()
    mlm = training_model("mlm")
    loss_of(mlm, batch)[0].backward()
    plain, contrasted = gradients_of(mlm.lm), gradients_of(lm)
    assert_same_gradients(
        gradients_of(model.lm), {name: plain[name] + 3 * contrasted.get(name, 0) for name in plain}
    )


def test_where_all_states_are_alike_every_token_is_as_likely() -> None:
    """High temperature: the loss is log(tokens of the sequence), padding not among them."""
    batch = toy_batch()
    lengths = batch.attention_mask.sum(dim=1).tolist()
    counts = [len(places) for places in masked_places(batch)]
    expected = sum(c * math.log(n) for c, n in zip(counts, lengths, strict=True)) / sum(counts)
    _, terms = loss_of(training_model("tacl", tacl_temperature=1e6), batch)
    assert terms["tacl"].item() == pytest.approx(expected, rel=1e-4)


def test_a_student_that_is_its_teacher_finds_every_token_of_a_text_without_masks() -> None:
    batch = toy_batch()
    batch.masked_ids.copy_(batch.input_ids)
    _, terms = loss_of(training_model("tacl", teacher_seed=0), batch)
    assert terms["tacl"].item() == pytest.approx(0, abs=1e-3)


def test_a_causal_model_is_refused() -> None:
    with pytest.raises(UserError, match="causal"):
        method_of("tacl").check(config_of("tacl"), causal=True)
    method_of("tacl").check(config_of("tacl"), causal=False)
