"""A base architecture with an extension: the same numbers after every way of saving and loading it."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from dga_scale.backbone.anatomy import Anatomy, anatomy_of
from dga_scale.backbone.extended import EXTENSIONS, ExtendedConfig, extend, model_class, register_extension
from dga_scale.backbone.loading import load_model, load_model_config, set_dropout
from dga_scale.errors import UserError
from dga_scale.unit_kinds import UNIT_KINDS
from tests.backbone.test_loading import write_tokenizer
from tests.helpers.tiny_models import TINY, batch

PLAIN = ["bert", "roberta", "gpt2", "llama tied"]
BATCH = batch()


class Scale(nn.Module):
    """An extension with a parameter, one made by a module of torch, and a buffer."""

    def __init__(self, width: int, start: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start, dtype=dtype))
        self.shift = nn.Linear(width, width, dtype=dtype)
        nn.init.eye_(self.shift.weight)
        self.register_buffer("passes", torch.tensor(1000.0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.shift(states * self.weight)


def apply_scale(base: PreTrainedModel, anatomy: Anatomy, settings: dict[str, float]) -> Anatomy | None:
    module = base.get_submodule(anatomy.ffn_outputs[-1])
    module.add_module("scale", Scale(anatomy.hidden_size, settings["start"], base.dtype))
    module.register_forward_hook(lambda module, _, output: module.scale(output))
    return None


register_extension("scale", apply_scale)


def extended(name: str, start: float = 1.5) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model with the extension, and the logits of the plain one."""
    base = TINY[name].model()
    with torch.no_grad():
        plain = base(**BATCH).logits
    return extend(base, "scale", {"start": start}), plain


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    model, plain = extended(name)
    with torch.no_grad():
        logits = model(**BATCH).logits
    assert (logits - plain).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        auto = AutoModelForCausalLM if TINY[name].causal else AutoModelForMaskedLM
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, logits)
    assert len(list(again.parameters())) == len(list(model.parameters())), "tied weights stay tied"
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("name", PLAIN)
def test_without_weight_an_extension_changes_nothing(name: str) -> None:
    model, plain = extended(name, start=1.0)
    model.get_submodule(model.anatomy.ffn_outputs[-1]).scale.shift.bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_anatomy_names_what_lies_in_the_wrapper(name: str) -> None:
    model, _ = extended(name)
    anatomy = anatomy_of(model)
    for part in anatomy.slices(UNIT_KINDS):
        assert model.get_parameter(part.parameter).shape[part.dim] == len(part.unit_index)
    for module in (*anatomy.attention_outputs, *anatomy.ffn_outputs):
        model.get_submodule(module)
    known = {parameter for parameter, _ in model.named_parameters()}
    assert known.issuperset(anatomy.lm_head_parameters)
    with torch.no_grad():
        hidden = anatomy.trunk(model)(**BATCH).last_hidden_state
        torch.testing.assert_close(anatomy.lm_logits(model, hidden), model(**BATCH).logits)


@pytest.mark.parametrize("name", PLAIN)
def test_classifier_and_bare_model_take_over_the_trunk(name: str, tmp_path: Path) -> None:
    model, _ = extended(name)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        hidden = anatomy_of(model).trunk(model)(**BATCH).last_hidden_state
        bare = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(bare(**BATCH).last_hidden_state, hidden)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, output_loading_info=True, attn_implementation="eager"
        )
        assert torch.equal(classifier.base_model(**BATCH).last_hidden_state, hidden)
    assert not [key for key in info["missing_keys"] if "scale" in key or "layer" in key]
    result = classifier(**BATCH, labels=torch.tensor([0, 1, 2]))
    assert result.logits.shape == (3, 3)
    result.loss.backward()
    scale = classifier.get_submodule(classifier.anatomy.ffn_outputs[-1]).scale
    assert scale.weight.grad.abs().max() > 0
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, classifier(**BATCH).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_load_model(name: str, tmp_path: Path) -> None:
    model, _ = extended(name)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    found = load_model_config(str(tmp_path))
    assert (found.causal, found.hidden_size, found.extended) == (TINY[name].causal, 32, True)
    loaded = load_model(str(tmp_path), dropout=0.25, attn_implementation="eager")
    model.config.use_cache = False  # as loaded: keys that went through a cache lie otherwise in memory
    assert not loaded.missing_head
    assert loaded.anatomy.num_heads == 4
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(**BATCH).logits, model(**BATCH).logits)
    rates = {module.p for module in loaded.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.25}
    assert not getattr(loaded.model.base.config, "use_cache", False) or not TINY[name].causal
    scale = loaded.model.get_submodule(loaded.anatomy.ffn_outputs[-1]).scale
    assert scale.passes == 1000


def test_config_shows_the_base_and_survives_a_copy(tmp_path: Path) -> None:
    model, _ = extended("roberta")
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.pad_token_id) == (96, 32, 1)
    config.use_cache = False
    assert config.base.use_cache is False
    set_dropout(config, 0.3)
    assert config.base.hidden_dropout_prob == 0.3
    config.save_pretrained(tmp_path)
    again = ExtendedConfig.from_pretrained(tmp_path)
    assert again.base.to_dict() == config.base.to_dict()
    assert (again.extension, again.extension_settings) == ("scale", {"start": 1.5})
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = config.nonsense


def test_mode_and_precision_stay() -> None:
    for training in (True, False):
        model = extend(TINY["bert"].model().train(training).bfloat16(), "scale", {"start": 1.0})
        assert model.training == training
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_model_class() -> None:
    assert model_class("ExtendedForMaskedLM").__name__ == "ExtendedForMaskedLM"
    assert model_class("BertForMaskedLM").__module__.startswith("transformers")


def test_what_is_refused(tmp_path: Path) -> None:
    model, _ = extended("bert")
    with pytest.raises(UserError, match="has the extension 'scale' already"):
        extend(model, "scale", {"start": 1.0})
    with pytest.raises(UserError, match=r"extension 'unheard' of the model is not known here .*scale"):
        extend(TINY["bert"].model(), "unheard", {})
    with pytest.raises(UserError, match="BertModel can't be extended"):
        extend(AutoModel.from_config(TINY["bert"].config()), "scale", {"start": 1.0})
    assert "scale" in EXTENSIONS
