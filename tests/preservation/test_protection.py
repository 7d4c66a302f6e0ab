"""Protection on a plain Hugging Face model and a torch optimizer: no DeepSpeed, no run."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM

from dga_scale.preservation.importance import Importance
from dga_scale.preservation.protection import Protection
from dga_scale.preservation.stepped_weights import TorchWeights
from tests.helpers.toy import HEADS, LAYERS, toy_batch, toy_lm

WIDTH = 8
"""Rows of a head in the query projection."""


def own_rows(lm: BertForMaskedLM) -> Tensor:
    """Query weights and biases by head: (layers, heads, entries)."""
    layers = []
    for layer in lm.bert.encoder.layer:
        query = layer.attention.self.query
        rows = torch.cat([query.weight, query.bias[:, None]], dim=1)  # (hidden, hidden + 1)
        layers.append(rows.detach().clone().view(HEADS, -1))
    return torch.stack(layers)


def train(lm: BertForMaskedLM, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    """Steps of the masked-LM loss, as any script makes them."""
    for step in range(steps):
        batch = toy_batch(8, seed=step)
        logits = lm(input_ids=batch.masked_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        F.cross_entropy(logits[batch.positions], batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(lm: BertForMaskedLM, start: Tensor) -> Tensor:
    """Root mean square movement of each head's own rows (layers, heads)."""
    return (own_rows(lm) - start).square().mean(dim=-1).sqrt()


def some_protection() -> Tensor:
    """``a`` (layers, heads): head 0 free, head 1 half, head 2 wholly protected, head 3 free."""
    return torch.tensor([[0.0, 0.5, 1.0, 0.0]] * LAYERS)


@pytest.mark.parametrize("soft_mask", ["update", "gradient"])
def test_a_wholly_protected_head_stays_where_it_is_to_the_last_bit(soft_mask: str) -> None:
    lm = toy_lm()
    optimizer = torch.optim.AdamW(
        lm.parameters(), lr=1e-3, weight_decay=0.0 if soft_mask == "gradient" else 0.1
    )
    protection = Protection(lm, soft_mask=soft_mask)
    protection.attach(optimizer)
    protection.set({"heads": some_protection()})
    start = own_rows(lm)
    train(lm, optimizer)
    assert torch.equal(own_rows(lm)[:, 2], start[:, 2])
    assert bool((moved(lm, start)[:, [0, 1, 3]] > 0).all())


def test_an_update_mask_takes_its_share_of_each_step_and_a_free_head_is_as_without() -> None:
    """One step from the same weights, with and without: the optimizer proposes the same."""
    free, masked = toy_lm(), toy_lm()
    start, found = own_rows(free), []
    for lm, soft_mask in ((free, "none"), (masked, "update")):
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, weight_decay=0.1)
        protection = Protection(lm, soft_mask=soft_mask)
        protection.attach(optimizer)
        protection.set({"heads": some_protection()})
        train(lm, optimizer, steps=1)
        found.append(protection)
    torch.testing.assert_close(
        moved(masked, start), moved(free, start) * (1 - some_protection()), rtol=1e-4, atol=1e-9
    )
    assert torch.equal(own_rows(masked)[:, 0], own_rows(free)[:, 0])
    assert found[0].applied_over_proposed() == {}
    torch.testing.assert_close(found[1].applied_over_proposed()["heads"], 1 - some_protection())


def test_a_gradient_mask_scales_the_gradients_of_plain_sgd() -> None:
    free, masked = toy_lm(), toy_lm()
    start = own_rows(free)
    train(free, torch.optim.SGD(free.parameters(), lr=0.1), steps=1)
    protection = Protection(masked, soft_mask="gradient")
    protection.set({"heads": some_protection()})
    train(masked, torch.optim.SGD(masked.parameters(), lr=0.1), steps=1)
    torch.testing.assert_close(
        moved(masked, start), moved(free, start) * (1 - some_protection()), rtol=1e-4, atol=1e-9
    )


def test_movement_is_measured_from_where_the_optimizer_was_attached() -> None:
    lm = toy_lm()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    train(lm, optimizer, steps=2)
    protection, start = Protection(lm, soft_mask="none"), own_rows(lm)
    assert protection.effective() == {}
    protection.attach(optimizer)
    protection.set({"heads": some_protection()})
    train(lm, optimizer, steps=2)
    effective = protection.effective()["heads"]
    torch.testing.assert_close(effective.movement, moved(lm, start), rtol=1e-4, atol=1e-9)
    least = moved(lm, start)[:, [0, 3]].mean(dim=1, keepdim=True)
    torch.testing.assert_close(effective.relative, moved(lm, start) / least, rtol=1e-4, atol=1e-9)


def test_importance_measured_on_the_plain_model_protects_it() -> None:
    """Gates are on the model while it is measured, and off it afterwards; parameters get no gradient."""
    lm = toy_lm(dropout=0.1)
    protection = Protection(lm, soft_mask="update")
    batches = [toy_batch(8, seed=seed) for seed in range(4)]
    importance = protection.measure(batches)
    assert importance.settings["examples"] == 32
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.modules())
    protection.protect(importance)
    values = importance.values["heads"]
    z = (values - values.mean(dim=1, keepdim=True)) / values.std(dim=1, keepdim=True, correction=0)
    torch.testing.assert_close(protection.a["heads"], torch.tanh(z).clamp(min=0))


def test_of_several_importances_the_one_that_needs_a_unit_most_counts() -> None:
    first, second = torch.rand(LAYERS, HEADS), torch.rand(LAYERS, HEADS)
    protection = Protection(toy_lm())
    protection.protect(Importance({"heads": first}, {}), Importance({"heads": second}, {}))
    alone = [Importance({"heads": values}, {}).protection()["heads"] for values in (first, second)]
    assert torch.equal(protection.a["heads"], torch.maximum(*alone))


def test_the_optimizers_weights_are_those_of_the_model() -> None:
    """A parameter that is not in the optimizer is not stepped, and has no fragment."""
    lm = toy_lm()
    query = lm.bert.encoder.layer[1].attention.self.query
    weights = TorchWeights(lm, torch.optim.SGD(query.parameters(), lr=1.0))
    fragments = {fragment.name: fragment for fragment in weights.fragments()}
    name = "bert.encoder.layer.1.attention.self.query"
    assert fragments.keys() == {f"{name}.weight", f"{name}.bias"}
    fragments[f"{name}.bias"].values.fill_(3)
    assert bool((query.bias == 3).all())


@pytest.mark.parametrize(
    ("a", "named"),
    [
        ({"heads": torch.zeros(1, HEADS)}, "shape"),
        ({"heads": torch.full((LAYERS, HEADS), 1.5)}, "leaves"),
        ({"heads": torch.zeros(LAYERS, HEADS), "bones": torch.zeros(1, 1)}, "bones"),
        ({}, "give that of heads"),
    ],
)
def test_what_can_not_be_a_protection_is_refused(a: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Protection(toy_lm()).set(a)


def test_an_unknown_soft_mask_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"gradient, update, none.*'weights'"):
        Protection(toy_lm(), soft_mask="weights")


def test_protection_imports_no_deepspeed() -> None:
    code = "import sys, dga_scale.preservation.protection; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
