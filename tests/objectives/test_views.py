"""Views of a batch in one pass and in several, and pooling."""

import pytest
import torch

from dga_scale.objectives.views import View, mean_pool, run_views
from tests.helpers.reference import Reference
from tests.helpers.toy import toy_batch, toy_lm, toy_model, toy_protection

VIEWS = (View("mlm", masked=True), View("full"), View("general", gated=True))


@pytest.mark.parametrize("split", [False, True])
def test_each_view_is_a_forward_of_its_own(split: bool) -> None:
    """Against the stock model: masked ids, clean ids, and clean ids with gates put on by hand."""
    model, batch, a = toy_model(), toy_batch(), toy_protection()
    trunk = model.anatomy.trunk(model.lm)
    hidden = run_views(trunk, model.gates, VIEWS, batch, {"heads": a}, split=split).hidden

    stock = toy_lm()
    reference = Reference(stock, protection=a)
    expected = {
        "mlm": stock.bert(batch.masked_ids, attention_mask=batch.attention_mask),
        "full": stock.bert(batch.input_ids, attention_mask=batch.attention_mask),
    }
    with reference.gated(a):
        expected["general"] = stock.bert(batch.input_ids, attention_mask=batch.attention_mask)
    assert hidden.keys() == expected.keys()
    for name, output in expected.items():
        torch.testing.assert_close(hidden[name], output.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert (hidden["general"] - hidden["full"]).abs().max() > 1e-2


def test_a_pass_leaves_no_gates_behind() -> None:
    model, batch = toy_model(), toy_batch()
    trunk = model.anatomy.trunk(model.lm)
    before = trunk(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    run_views(trunk, model.gates, VIEWS, batch, {"heads": toy_protection()})
    after = trunk(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert torch.equal(before, after)


def test_views_draw_their_own_dropout() -> None:
    model, batch = toy_model(dropout=0.1), toy_batch()
    views = (View("full"), View("full_plus"))
    for split in (False, True):
        hidden = run_views(
            model.anatomy.trunk(model.lm),
            model.gates,
            views,
            batch,
            {},
            split=split,
        ).hidden
        assert (hidden["full"] - hidden["full_plus"]).abs().max() > 1e-2


def test_mean_pool_is_the_mean_of_real_tokens() -> None:
    batch = toy_batch()
    hidden = torch.randn(*batch.input_ids.shape, 32)
    pooled = mean_pool(hidden, batch.attention_mask)
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        torch.testing.assert_close(pooled[row], hidden[row, :length].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_mean_pool_sums_low_precision_in_fp32() -> None:
    """1 and the next larger bf16 number, half of the tokens each: the mean is no bf16 number."""
    hidden = torch.tensor([1.0, 1.0 + 2.0**-7] * 150, dtype=torch.bfloat16).view(1, 300, 1)
    assert mean_pool(hidden, torch.ones(1, 300, dtype=torch.long)).item() == pytest.approx(1 + 2.0**-8)
