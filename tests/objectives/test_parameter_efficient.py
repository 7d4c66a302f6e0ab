"""LoRA, adapters and soft prompts as methods: what trains; under ZeRO 2 and 3, resumed and exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

import dga_scale.backbone.extended  # noqa: F401  # what a user imports to load the exported models
from dga_scale.backbone.peft.lora import FOLDER
from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.state import load_checkpoint
from dga_scale.checkpoint.store import newest_verified
from dga_scale.corpus.loading.batches import Batch
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster
from dga_scale.zero.optimizer_hooks import backward
from tests.helpers.batches import rows_of
from tests.helpers.comparison import (
    config_of,
    counts_of,
    loss_of,
    method_context,
    method_of,
    training_model,
)
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import make_world
from tests.helpers.toy import toy_batch, toy_lm
from tests.helpers.training import Setup, full_weights, save, tiny_engine
from tests.test_train import arguments, run_training

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 2},
    "adapter": {"adapter_size": 6},
    "prompt": {"prompt_tokens": 3},
}
OWN = {"lora": "lora_", "adapter": ".adapter.", "prompt": ".soft_prompt."}
BATCH = toy_batch()


def logits_of(lm: PreTrainedModel) -> Tensor:
    training = lm.training
    lm.eval()
    with torch.no_grad():
        logits = lm(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    lm.train(training)
    return logits


@pytest.mark.parametrize("name", SETTINGS)
def test_only_its_own_parameters_move(name: str) -> None:
    """Not the LM head either."""
    model = training_model(name, **SETTINGS[name])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # in the first step only what starts at 0 has a gradient
        loss_of(model, BATCH)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if OWN[name] in n}


def stepped(engine: DeepSpeedEngine, batch: Batch, steps: range) -> None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = len(batch.input_ids) // ranks
    own = rows_of(batch, slice(rank * size, (rank + 1) * size))
    for _ in steps:
        loss, _ = engine(own, counts_of(batch, num_micro_batches=ranks))
        backward(engine, loss)
        engine.step()


def trained(
    folder: Path, names: list[str], setup: Setup
) -> dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Logits after two steps; after one, a resume and another; the weights that were trained."""
    found = {}
    for name in names:
        engine = tiny_engine(setup, training_model(name, **SETTINGS[name]))
        stepped(engine, BATCH, range(1))
        save(engine, folder / name, 1)
        stepped(engine, BATCH, range(1, 2))
        save(engine, folder / name / "ended", 2)
        logits, weights = logits_of(engine.module.lm), full_weights(engine)
        engine.destroy()

        engine = tiny_engine(setup, training_model(name, **SETTINGS[name]))
        checkpoint = newest_verified(folder / name, join_cluster())
        assert checkpoint is not None
        load_checkpoint(engine, checkpoint, join_cluster())
        stepped(engine, BATCH, range(1, 2))
        found[name] = logits, logits_of(engine.module.lm), weights
        engine.destroy()
    return found


@pytest.mark.parametrize("setup", [Setup(2), Setup(3)], ids=str)
def test_trained_on_ranks_resumed_and_exported(setup: Setup, tmp_path: Path) -> None:
    by_rank = run_ranks(2, trained, tmp_path, list(SETTINGS), setup)
    for name in SETTINGS:
        logits, resumed, weights = by_rank[0][name]
        assert torch.equal(resumed, logits), name
        assert all(OWN[name] in parameter for parameter in weights), name
        folder = consolidate(tmp_path / name / "ended", None, tmp_path / f"{name}-model")
        model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (name, info)
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-5)
        assert (logits - logits_of(toy_lm())).abs().max() > 1e-3, name
        stored = load_file(folder / "model.safetensors")
        plain = toy_lm().state_dict()
        if name == "lora":
            assert stored.keys() <= plain.keys()
            adapted = PeftModel.from_pretrained(toy_lm(), folder / FOLDER)
            torch.testing.assert_close(logits_of(adapted), logits, rtol=1e-4, atol=1e-5)
        else:
            frozen = {key: value for key, value in stored.items() if OWN[name] not in key}
            assert len(stored) - len(frozen) == (16 if name == "adapter" else 1)
            assert all(torch.equal(value, plain[key.removeprefix("base.")]) for key, value in frozen.items())


def test_a_run_starts_with_the_adapters_of_an_earlier_one(tmp_path: Path) -> None:
    """The exported model says of its base what was published, not the dropout that the run set."""
    world = make_world(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    flags = {"method": "adapter", "adapter_size": 6, "max_steps": 2, "dropout": 0.3}
    assert run_ranks(2, run_training, arguments(world, first, **flags)) == [0, 0]
    started = dataclasses.replace(world, model=first / "model")
    assert run_ranks(2, run_training, arguments(started, second, **flags)) == [0, 0]
    before, after = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if OWN["adapter"] in name}
    config = json.loads((second / "model" / "config.json").read_text())
    assert config["base"]["hidden_dropout_prob"] == 0.1
    with pytest.raises(RankError, match="the model's own"):
        run_ranks(2, run_training, arguments(started, tmp_path / "third", **flags | {"adapter_size": 7}))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_freeze_what_is_frozen_are_refused(name: str) -> None:
    method = method_of(name)
    method.check(config_of(name), causal=False)
    for setting, value in (("freeze_layers", 1), ("freeze_embeddings", True)):
        with pytest.raises(UserError, match=f"--{setting}"):
            method.check(config_of(name, **{setting: value}), causal=False)


def test_lora_targets_and_what_its_config_says() -> None:
    lm = toy_lm()
    config = config_of("lora", lora_targets=["value", "down"], lora_rank=4, lora_alpha=6.0, lora_dropout=0.1)
    method = method_of("lora", lora_targets=["value", "down"], lora_rank=4, lora_alpha=6.0, lora_dropout=0.1)
    assert method.prepare(method_context(lm, config)) is None
    layer = lm.bert.encoder.layer[1]
    assert layer.attention.self.value.scaling == {"default": 1.5}
    assert layer.output.dense.lora_dropout["default"].p == 0.1
    assert isinstance(layer.attention.self.query, torch.nn.Linear)
