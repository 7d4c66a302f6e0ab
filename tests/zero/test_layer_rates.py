"""Layer-wise learning rates and freezing in whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, run_training

RATE = 1e-3


def largest_moves(world: SmallWorld, run: Path) -> dict[str, float]:
    before, after = (
        load_file(world.model / "model.safetensors"),
        load_file(run / "model" / "model.safetensors"),
    )
    return {name: (after[name] - before[name]).abs().max().item() for name in after}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_each_layers_rate_is_that_of_the_layer_above_times_the_decay(
    stage: int, world: SmallWorld, tmp_path: Path
) -> None:
    """Adam's first step moves a weight by its learning rate, whatever its gradient (epsilon aside)."""
    flags = arguments(
        world, tmp_path / "run", method="mlm", ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json",
        max_steps=1, warmup_ratio=0.0, learning_rate=RATE, layer_lr_decay=0.5, adam_epsilon=1e-12,
        general_eval_corpus=None,
    )  # fmt: skip
    assert run_ranks(2, run_training, flags) == [0, 0]
    moves = largest_moves(world, tmp_path / "run")
    layers = "bert.encoder.layer"
    for name, scale in {
        "cls.predictions.transform.dense.weight": 1.0,
        f"{layers}.1.attention.self.query.weight": 0.5,
        f"{layers}.0.output.dense.weight": 0.25,
        "bert.embeddings.word_embeddings.weight": 0.125,
    }.items():
        assert moves[name] == pytest.approx(RATE * scale, rel=1e-3), name


@pytest.mark.parametrize("stage", [0, 2])
def test_frozen_weights_come_back_as_they_were(stage: int, world: SmallWorld, tmp_path: Path) -> None:
    """In bf16 too: they are exported in the fp32 that they were loaded in; and the run resumes from them."""
    flags = arguments(
        world, tmp_path / "run", method="mlm", ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json",
        bf16="true", freeze_layers=1, freeze_embeddings="true", max_steps=2, general_eval_corpus=None,
    )  # fmt: skip
    assert run_ranks(2, run_training, flags) == [0, 0]
    moves = largest_moves(world, tmp_path / "run")
    frozen = {name for name, move in moves.items() if move == 0}
    expected = {n for n in moves if n.startswith(("bert.embeddings", "bert.encoder.layer.0."))}
    assert frozen == expected
    parameters = dict(AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").named_parameters())
    kept = load_file(world.model / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(kept, kept.bfloat16().float()), "rounding to bf16 would show"
    assert torch.equal(parameters["bert.encoder.layer.0.output.dense.weight"], kept)
