"""Dropout and attention for CPUs, against closed forms and against torch's own."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.cpu_kernels import ATTENTION, Dropout, attention, use_cpu_kernels
from dga_scale.backbone.extended import extend
from dga_scale.backbone.loading import set_dropout
from tests.backbone.peft.test_adapters import SETTINGS
from tests.helpers.tiny_models import TINY, batch

NOTHING_DROPPED = 1e-6
"""A probability that rounds to 0: attention takes the way of dropout, and drops nothing."""


def without_dropout(name: str, of_attention: float = 0.0) -> PreTrainedModel:
    """A model with no dropout but that of attention, whatever the architecture calls it."""
    config = TINY[name].config()
    set_dropout(config, 0.0)
    ours = {
        n for n in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop") if hasattr(config, n)
    }
    values = {n: getattr(config, n) for n in config.to_dict() if "drop" in n} | dict.fromkeys(
        ours, of_attention
    )
    return TINY[name].model(attn_implementation="sdpa", **values)


def of_other_kind(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    use_cpu_kernels(changed)
    return changed


def hidden(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    states: Tensor = anatomy_of(model).trunk(model)(**inputs).last_hidden_state
    return states


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003, 0.9])
def test_drops_with_its_probability_and_keeps_the_mean(p: float) -> None:
    n = 400_000
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(n))
    share = (dropped == 0).double().mean().item()
    rounded = round(p * 65536) / 65536
    assert abs(share - rounded) < 4 * (p * (1 - p) / n) ** 0.5  # four standard deviations
    kept = dropped[dropped != 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - rounded)))


def test_neighbours_are_dropped_independently() -> None:
    """Four draws are cut from a word: none of them may know of another."""
    torch.manual_seed(1)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).double().view(-1, 4)
    correlations = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / len(dropped) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_passes_where_the_input_did(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    # No multiple of a word's four draws. Drawn in fp32: bf16 draws can be 0, which looks dropped.
    x = torch.randn(33, 7).to(dtype).requires_grad_()
    y = Dropout(0.25)(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    keep = (y != 0).to(dtype)
    assert 0 < keep.mean() < 1
    torch.testing.assert_close(y, x.detach() * keep * (4 / 3))
    torch.testing.assert_close(x.grad, upstream * keep * (4 / 3))


def test_same_seed_same_draws_and_recomputation_repeats_them() -> None:
    drop, x = Dropout(0.3), torch.randn(64, 32, requires_grad=True)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert torch.equal(drop(x), second)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = checkpoint(lambda t: drop(t).square(), x, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(again.sum(), x), torch.autograd.grad(first.square().sum(), x)
    )


def test_eval_mode_and_no_dropout_change_nothing() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 5))


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen3", "distilbert"])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_equals_sdpa(name: str, padded: bool) -> None:
    """Hidden states and gradients, with nothing dropped; padding, causal masks, windows, grouped heads."""
    models = [without_dropout(name), without_dropout(name, NOTHING_DROPPED)]
    models[1].load_state_dict(models[0].state_dict())
    use_cpu_kernels(models[1])
    inputs = batch()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    states = [hidden(model.double().train(), **inputs)[real] for model in models]
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(states[0])
    for each in states:
        (each * direction).sum().backward()
    gradients = dict(models[1].named_parameters())
    for parameter, value in models[0].named_parameters():
        torch.testing.assert_close(gradients[parameter].grad, value.grad, rtol=1e-8, atol=1e-8)


def test_attention_drops_weights_in_place_of_torch() -> None:
    """Against the definition: the kept weights are scaled, and the rest of the values is not read."""
    layer = nn.Identity().train()
    torch.manual_seed(4)
    query, key = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = torch.eye(6, 8, dtype=torch.float64).expand(2, 4, 6, 8)  # shows the weights
    found, _ = attention(layer, query, key, value, None, dropout=0.5, is_causal=False)
    weights = (query @ key.mT / 8**0.5).softmax(dim=-1)
    shown = found.transpose(1, 2)[..., :6]
    kept = shown != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(shown, weights * kept * 2)


@pytest.mark.parametrize("training", [True, False])
def test_bf16_is_as_near_to_fp32_as_sdpa(training: bool) -> None:
    model = without_dropout("bert")
    exact = hidden(model, **batch()).detach()
    model = model.bfloat16().train(training)
    errors = [
        (hidden(each, **batch()).float() - exact).abs().mean().item()
        for each in (model, of_other_kind(model))
    ]
    assert errors[0] != errors[1]  # computed in another way
    assert errors[1] < 1.3 * errors[0]


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    layer = nn.Identity().train()
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    found, _ = attention(layer, query, key, value, mask)
    found.sum().backward()
    for tensor in (found, query.grad, key.grad, value.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_model_is_changed_and_its_folder_is_not(tmp_path: Path) -> None:
    model = TINY["bert"].model(attn_implementation="sdpa")
    changed = of_other_kind(model)
    kinds = {type(m) for m in changed.modules() if isinstance(m, nn.Dropout)}
    assert kinds == {Dropout}
    assert changed.config._attn_implementation == ATTENTION
    assert [n for n, _ in changed.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(changed.state_dict()) == list(model.state_dict())
    for folder, each in (("before", model), ("after", changed)):
        each.save_pretrained(tmp_path / folder)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    assert "attn" not in json.dumps(changed.config.to_dict())
    inputs = batch()
    assert torch.equal(changed.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_added_modules_and_chosen_attention() -> None:
    """LoRA's dropout is swapped by a second call; an attention that the user has chosen stays."""
    model = TINY["roberta"].model(attn_implementation="sdpa")
    use_cpu_kernels(model)
    changed = extend(model, "adapter", SETTINGS)
    changed.added = nn.Sequential(nn.Dropout(0.1))
    use_cpu_kernels(changed)
    assert type(changed.added[0]) is Dropout
    eager = of_other_kind(TINY["roberta"].model(attn_implementation="eager"))
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize(("p", "dtype"), [(0.0, torch.bfloat16), (0.1, torch.float32)])
def test_a_pass_without_gradients_equals_one_with(p: float, dtype: torch.dtype) -> None:
    """GradCache makes both of the same batch; and proxy KL rests on two draws that differ."""
    model = of_other_kind(without_dropout("bert", of_attention=p)).train().to(dtype)
    torch.manual_seed(5)
    first, second = hidden(model, **batch()), hidden(model, **batch())
    assert torch.equal(first, second) == (p == 0)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(hidden(model, **batch()), first)
