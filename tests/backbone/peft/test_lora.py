"""LoRA in every architecture: the base at the start; once trained, merged, and as peft loads it."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import anatomy_of
from dga_scale.backbone.peft.lora import FOLDER, WEIGHTS, LoraWeights, inject_lora, save_lora_config
from tests.helpers.tiny_models import TINY, batch

BATCH = batch()
ATTENTION = ("query", "key", "value", "output")


def with_lora(name: str, roles: tuple[str, ...] = ATTENTION, rank: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    model = TINY[name].model()
    inject_lora(model, anatomy_of(model), roles=roles, rank=rank, alpha=5.0, dropout=0.0)
    return model


def train(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def plain_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return TINY[name].model()


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_starts_as_its_base_and_merges(name: str, tmp_path: Path) -> None:
    plain, model = plain_model(name), with_lora(name)
    with torch.no_grad():
        start = plain(**BATCH).logits
        torch.testing.assert_close(model(**BATCH).logits, start, rtol=1e-6, atol=1e-6)
        train(model)
        trained = model(**BATCH).logits
        assert (trained - start).abs().max() > 1e-2
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if "lora_" in n}

    save_lora_config(model, tmp_path)
    lora = LoraWeights.described_in(tmp_path)
    assert lora is not None
    stored = model.state_dict()
    merged = {
        own: lora.merged(source, lambda stored_name: stored[stored_name])
        for own, source in lora.plain_names(stored).items()
    }
    plain.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain(**BATCH).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_peft_loads_the_adapter_onto_the_base(name: str, tmp_path: Path) -> None:
    model = with_lora(name)
    train(model)
    save_lora_config(model, tmp_path)
    lora = LoraWeights.described_in(tmp_path)
    assert lora is not None
    stored = model.state_dict()
    own = {n: stored[source].contiguous() for n, source in lora.adapter_names(stored).items()}
    save_file(own, tmp_path / FOLDER / WEIGHTS)
    loaded = PeftModel.from_pretrained(plain_model(name), tmp_path / FOLDER).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


def test_targets_are_the_projections_of_the_roles() -> None:
    model = with_lora("roberta", ("query", "up"))
    found = {n.removesuffix(".lora_A.default.weight") for n, _ in model.named_parameters() if ".lora_A." in n}
    layers = [f"roberta.encoder.layer.{layer}." for layer in range(2)]
    assert found == {
        layer + part for layer in layers for part in ("attention.self.query", "intermediate.dense")
    }


def test_a_plain_model_has_no_lora(tmp_path: Path) -> None:
    save_lora_config(plain_model("bert"), tmp_path)
    assert not list(tmp_path.iterdir())
    assert LoraWeights.described_in(tmp_path) is None
