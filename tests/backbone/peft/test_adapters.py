"""Bottleneck adapters in every architecture: the base at the start, the formula once trained, and back."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.extended import ExtendedPreTrainedModel, extend
from dga_scale.backbone.peft.adapters import ADAPTER
from tests.helpers.tiny_models import TINY, batch

BATCH = batch()
SETTINGS = {"size": 6, "activation": "gelu"}


def with_adapters(name: str, trained: bool) -> ExtendedPreTrainedModel:
    model = extend(TINY[name].model(), "adapter", SETTINGS)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if trained and f".{ADAPTER}." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_starts_as_its_base_and_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = TINY[name].model()
    with torch.no_grad():
        plain = base(**BATCH).logits
        model = extend(base, "adapter", SETTINGS)
        assert torch.equal(model(**BATCH).logits, plain)
    own = [p for n, p in model.named_parameters() if f".{ADAPTER}." in n]
    width = anatomy_of(model).hidden_size
    assert len(own) == 2 * 2 * 4  # two a layer, of two layers
    assert sum(p.numel() for p in own) == 4 * (2 * 6 * width + 6 + width)
    model = with_adapters(name, trained=True)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if TINY[name].causal else AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        logits = model(**BATCH).logits
        assert torch.equal(again(**BATCH).logits, logits)


def test_a_trained_adapter_is_the_formula_behind_both_projections() -> None:
    """Of BERT, whose projections are called by their names here; the residual connection comes after."""
    model = with_adapters("bert", trained=True)
    for name in ("attention.output", "output"):
        sublayer = model.base.get_submodule(f"bert.encoder.layer.1.{name}")
        dense = sublayer.dense
        found: dict[str, Tensor] = {}
        handle = sublayer.register_forward_hook(
            lambda module, args, output, found=found: found.update(x=args[0], residual=args[1], y=output)
        )
        with torch.no_grad():
            model(**BATCH)
            h = F.linear(found["x"], dense.weight, dense.bias)
            down, up = dense.adapter.down, dense.adapter.up
            bottleneck = F.gelu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
            expected = sublayer.LayerNorm(h + bottleneck + found["residual"])
        handle.remove()
        torch.testing.assert_close(found["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_copy_calls_its_own_adapters_and_a_classifier_takes_them_over(tmp_path: Path) -> None:
    model = with_adapters("bert", trained=True)
    with torch.no_grad():
        logits = model(**BATCH).logits
        hidden = model.base_model(**BATCH).last_hidden_state
        clone = copy.deepcopy(model)
        clone.base.bert.encoder.layer[0].output.dense.adapter.up.weight.zero_()
        assert not torch.allclose(clone(**BATCH).logits, logits)
        assert torch.equal(model(**BATCH).logits, logits)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(classifier.base_model(**BATCH).last_hidden_state, hidden)
