"""Presets against published counts and closed forms; what is read off an architecture; clear refusals."""

from pathlib import Path
from typing import Any

import pytest

from dga_scale.errors import UserError
from dga_scale.planning.gpus import GPUS, find_gpu
from dga_scale.planning.models import PRESETS, find_config
from tests.helpers.tiny_models import TINY
from tests.planning.test_memory import plan_of


def bert_like(v: int, h: int, layers: int, f: int, positions: int, types: int, norms: int) -> int:
    """Parameters of an encoder with a tied LM head; ``norms`` outside the blocks, LM head included."""
    block = 4 * (h * h + h) + 2 * h * f + f + h + 2 * 2 * h
    return (v + positions + types) * h + layers * block + norms * 2 * h + h * h + h + v


def llama(v: int, h: int, layers: int, f: int, kv: int) -> int:
    return 2 * v * h + layers * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h) + h


def modernbert(v: int, h: int, layers: int, f: int) -> int:
    """No biases but the decoder's; the first block has no attention norm; final and head norm."""
    return v * h + layers * (4 * h * h + 3 * h * f + 2 * h) - h + h + h + h * h + h + v


EXPECTED = {
    "bert-base-uncased": bert_like(30522, 768, 12, 3072, 512, 2, 2),
    "roberta-base": bert_like(50265, 768, 12, 3072, 514, 1, 2),
    "roberta-large": bert_like(50265, 1024, 24, 4096, 514, 1, 2),
    "xlm-roberta-base": bert_like(250002, 768, 12, 3072, 514, 1, 2),
    "xlm-roberta-large": bert_like(250002, 1024, 24, 4096, 514, 1, 2),
    "xlm-roberta-xl": bert_like(250880, 2560, 36, 10240, 514, 1, 2),
    "xlm-roberta-xxl": bert_like(250880, 4096, 48, 16384, 514, 1, 2),
    "modernbert-base": modernbert(50368, 768, 22, 1152),
    "modernbert-large": modernbert(50368, 1024, 28, 2624),
    "llama-70b": 70_553_706_496,  # as published for Llama 3
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    model = plan_of(name)
    assert model.parameters == EXPECTED[name]
    assert model.trained_parameters == model.parameters
    assert model.trained_layers == model.anatomy.num_layers


def test_the_closed_form_of_a_decoder() -> None:
    assert llama(128256, 8192, 80, 28672, 1024) == EXPECTED["llama-70b"]


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("roberta-base", {"kv_size": 768, "gated": False, "fp32_norms": False, "dropout": True}),
        ("modernbert-base", {"kv_size": 768, "gated": True, "fused_rotary": True, "dropout": False}),
        ("llama-70b", {"kv_size": 1024, "gated": True, "fused_rotary": False, "fp32_norms": True}),
    ],
)
def test_traits(name: str, traits: dict[str, Any]) -> None:
    model = plan_of(name)
    assert {key: getattr(model, key) for key in traits} == traits


def test_frozen_and_added_parameters() -> None:
    frozen = plan_of("roberta-base", "--freeze_layers", "4", "--freeze_embeddings", "true")
    assert frozen.trained_layers == 8
    assert frozen.trained_parameters < frozen.parameters
    lora = plan_of("roberta-base", "--method", "lora", "--lora_rank", "8")
    assert lora.trained_parameters == 12 * 4 * 2 * 8 * 768  # four projections, two factors
    # Gradients of soft tokens go through all blocks.
    assert plan_of("roberta-base", "--method", "prompt").trained_layers == 12


@pytest.mark.parametrize("name", TINY)
def test_parameters_of_an_architecture_are_those_torch_has(name: str, tmp_path: Path) -> None:
    lm = TINY[name].model()
    TINY[name].config().to_json_file(tmp_path / "config.json", use_diff=False)
    model = plan_of(str(tmp_path / "config.json"))
    assert model.parameters == lm.num_parameters()
    calls = {"albert": 6}.get(name, 2)  # ALBERT's two layers are called three times each
    assert model.trained_layers == calls
    assert model.checkpoints == TINY[name].checkpoints


def test_experts_are_not_planned() -> None:
    with pytest.raises(UserError, match="depends on the text"):
        plan_of("roberta-base", "--method", "cse", "--mix", "x:0.1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nobody/such-model", None, "Sizes known without the hub: bert-base"),
        ("roberta-bas", None, "Did you mean roberta-base"),
        ("missing.json", None, "No such file"),
        ("x.json", "{}", "no model_type"),
        ("x.json", "{", "x.json: no config"),
        ("x.json", '{"model_type": "clip"}', "clip models read more than text"),
    ],
)
def test_models_that_cannot_be_found(
    name: str, content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_config(name)


def test_a_folder_wins_over_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = find_config("roberta-base")
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "roberta-base")
    assert find_config("roberta-base").num_hidden_layers == 3
    assert find_config("FacebookAI/roberta-base").num_hidden_layers == 12


GPU = {
    "memory_gib": 24, "bf16_tflops": 165, "fp32_tflops": 82, "memory_gbs": 1008, "intra_node_gbs": 25,
    "inter_node_gbs": 10,
}  # fmt: skip


def test_a_gpu_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rtx.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in {**GPU, "mfu": 0.3}.items()))
    found = find_gpu(str(path))
    assert (found.memory_gib, found.mfu, found.overlap) == (24, 0.3, GPUS["h100"].overlap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16_tflops": None}, "bf16_tflops missing"),
        ({"memory_gb": 24}, "unknown figure 'memory_gb'. Did you mean memory_g"),
        ({"memory_gib": "many"}, 'memory_gib is "many"'),
        ({"mfu": 40}, "mfu is 40"),
    ],
)
def test_a_gpu_file_with_a_mistake(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    content = {**GPU, **changes}
    path.write_text("\n".join(f"{key}: {value}" for key, value in content.items() if value is not None))
    with pytest.raises(UserError, match=message):
        find_gpu(str(path))


def test_an_unknown_gpu() -> None:
    with pytest.raises(UserError, match="Did you mean h100"):
        find_gpu("h10")
    with pytest.raises(UserError, match="No such file"):
        find_gpu("nowhere.yaml")
