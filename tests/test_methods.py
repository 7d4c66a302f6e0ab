"""Every method as a whole run: 20 steps on two ranks under ZeRO-2 and 3, cut in the middle and resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import dga_scale.backbone.extended  # noqa: F401 - registers the classes that adapters, prompts and experts need
from dga_scale.config.declaration import declared
from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.objectives.methods import METHODS
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, run_training

pytestmark = pytest.mark.slow

STEPS = 10
OWN: dict[str, dict[str, Any]] = {
    "das": {
        "soft_mask": "update",
        "contrast_views": "shared",
        "contrast_scope": "global_batch",
        "gradient_accumulation_steps": 2,
    },
    "dga": {"soft_mask": "gradient"},
    "ewc": {"fisher_samples": 16, "ewc_weight": 5.0},
    "l2": {"l2_weight": 5.0},
    "prompt": {"prompt_tokens": 8},
    "cse": {"cse_samples": 64, "cse_projection": 8, "cse_layers": 1},
}
"""Settings that keep a method's own work short, and those that no other test takes through a whole run."""


def flags_of(world: SmallWorld, run: Path, method: str, stage: int) -> list[str]:
    settings = OWN.get(method, {})
    if method == "ewc":
        settings = settings | {"general_corpus": world.general_corpus}
    mixed = METHODS[method].needs_mix or method == "cse"
    return arguments(
        world,
        run,
        method=method,
        ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json",
        mix=f"{world.general_corpus}:0.3" if mixed else None,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        eval_steps=STEPS,
        general_eval_corpus=None,
        max_eval_samples=16,
        protection_steps=STEPS // 2,
        **settings,
    )


def losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    return [{name: value for name, value in line.items() if name.startswith("loss/")} for line in steps]


def cut(whole: Path, parts: Path) -> None:
    """What a run leaves that was killed between its 5th step's checkpoint and the end."""
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step-{STEPS:06d}")
    (parts / "checkpoints" / "latest").write_text(f"step-{STEPS // 2:06d}\n")
    shutil.rmtree(parts / "model")
    for name in ("report.html", "summary.json", "importance-after.safetensors"):
        (parts / name).unlink(missing_ok=True)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cut_resumes_bit_for_bit(
    method: str, stage: int, world: SmallWorld, tmp_path: Path
) -> None:
    """Losses and weights of a run that resumes after 5 steps are those of one that was not cut."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_ranks(2, run_training, flags_of(world, whole, method, stage)) == [0, 0]
    cut(whole, parts)
    assert run_ranks(2, run_training, flags_of(world, parts, method, stage)) == [0, 0]

    assert len(losses(whole)) == STEPS
    assert losses(parts) == losses(whole)
    logged = {"l2": "loss/weight_regularisation", "ewc": "loss/weight_regularisation"}.get(method, "loss/mlm")
    assert all(step[logged] > 0 for step in losses(whole))
    if METHODS[method].needs_mix:
        assert all(step["loss/mlm/general_corpus"] > 0 for step in losses(whole))
    one, other = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = AutoModelForMaskedLM.from_pretrained(whole / "model")
    logits = model(torch.tensor([[5, 6, 7, 8]])).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_other_methods_are_refused_by_name(method: str) -> None:
    own = set(METHODS[method].Settings.__dataclass_fields__)
    for other, entry in METHODS.items():
        for name in set(entry.Settings.__dataclass_fields__) - own:
            with pytest.raises(UserError, match=rf"--{name} is a setting of --method .*{other}.* {method}"):
                read_config(["--ds_config=x.json", f"--method={method}", f"--{name}=1"])


@pytest.mark.parametrize("method", METHODS)
def test_numbers_out_of_range_are_refused(method: str) -> None:
    for name in [each.name for each in declared(METHODS[method].Settings) if each.rule]:
        with pytest.raises(UserError, match=rf"--{name} -3"):
            read_config(["--ds_config=x.json", f"--method={method}", f"--{name}=-3"])


def test_methods_that_read_general_text_ask_for_it(world: SmallWorld, tmp_path: Path) -> None:
    for method in METHODS:
        if METHODS[method].needs_mix:
            flags = [f for f in flags_of(world, tmp_path / method, method, 2) if not f.startswith("--mix")]
            with pytest.raises(Exception, match="--mix FOLDER:SHARE"):
                run_ranks(1, run_training, flags)
