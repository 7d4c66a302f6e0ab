"""An optimizer added through the table: it trains under a mask, resumes to the last bit, and is planned."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dga_scale.config.parsing import read_config
from dga_scale.config.settings import OptimizationSettings
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.launch.world import single_process
from dga_scale.planning.memory import Zero
from dga_scale.train.inputs import check_inputs
from dga_scale.zero.optimizers import OPTIMIZERS, Groups, OptimizerKind
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.helpers.training import Setup, tiny_engine
from tests.test_train import arguments, losses, refusal, run_training, run_until


def sgd(groups: Groups, settings: OptimizationSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.adam_beta1)


def amsgrad(groups: Groups, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """AdamW's class, with one moment more than the table's entry of that class."""
    return torch.optim.AdamW(groups, lr=0.0, amsgrad=True, fused=True)


SGD = OptimizerKind(sgd, moments=("momentum_buffer",))
ADDED = {"sgd": SGD, "amsgrad": OptimizerKind(amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))}


def run_with(optimizer: str, flags: list[str], stop_at: int) -> int:
    OPTIMIZERS[optimizer] = ADDED[optimizer]
    try:
        return run_until([*flags, "--optimizer", optimizer], stop_at, 0)
    finally:
        del OPTIMIZERS[optimizer]


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 0.1), ("amsgrad", 1e-3)])
def test_a_new_optimizer_trains_and_resumes_to_the_last_bit(
    optimizer: str, learning_rate: float, world: SmallWorld, tmp_path: Path
) -> None:
    def flags(run: str) -> list[str]:
        return arguments(
            world,
            tmp_path / run,
            soft_mask="update",
            learning_rate=learning_rate,
            max_eval_samples=16,
            check_invariants=1,
        )

    assert run_ranks(2, run_with, optimizer, flags("whole"), -1) == [0, 0]
    assert run_ranks(2, run_with, optimizer, flags("cut"), 2) == [EXIT_STOPPED, EXIT_STOPPED]
    assert run_ranks(2, run_with, optimizer, flags("cut"), -1) == [0, 0]
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == whole
    assert whole[-1] < whole[0]


def test_a_plan_counts_what_the_optimizer_keeps(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", SGD)
    flags = arguments(world, tmp_path / "run", method="mlm")
    kept = []
    for more in ([], ["--optimizer", "sgd"]):
        resolved = check_inputs(read_config([*flags, *more]), single_process()).resolved
        kept.append(Zero.of(resolved, 1).moments)
    assert kept == [2, 1]


def test_another_optimizer_does_not_resume_from_a_checkpoint(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own folder, where the settings say so, and in a new one, where only the checkpoint knows."""
    monkeypatch.setitem(OPTIMIZERS, "sgd", SGD)
    first, new = tmp_path / "first", tmp_path / "new"
    assert run_ranks(2, run_training, arguments(world, first, method="mlm", max_steps=1)) == [0, 0]
    sgd_flags = {"method": "mlm", "max_steps": 1, "optimizer": "sgd"}
    assert "optimizer was 'adamw', is 'sgd'" in refusal(arguments(world, first, **sgd_flags))
    checkpoint = first / "checkpoints" / "step-000001"
    said = refusal(arguments(world, new, resume=checkpoint, **sgd_flags))
    assert said.startswith(f"--optimizer sgd: {checkpoint} was trained with adamw")
    assert "give --optimizer adamw" in said
    assert "\n" not in said


def attached() -> tuple[bool, int]:
    """Build an engine with an optimizer that asks for it: what it is given, and how often."""
    calls: list[tuple[Any, Any]] = []
    OPTIMIZERS["adamw"] = dataclasses.replace(
        OPTIMIZERS["adamw"], attach=lambda optimizer, engine: calls.append((optimizer, engine))
    )
    engine = tiny_engine(Setup(2, "bf16"))
    found = [optimizer is engine.basic_optimizer and own is engine for optimizer, own in calls]
    engine.destroy()
    return all(found), len(found)


def test_an_optimizer_is_attached_to_its_engine_once() -> None:
    assert run_ranks(2, attached) == [(True, 1), (True, 1)]


@pytest.mark.parametrize(
    ("flag", "name", "right"), [("optimizer", "adam", "adamw"), ("loggers", "tensorbord", "tensorboard")]
)
def test_a_name_that_no_table_has_is_refused_before_anything_is_read(
    flag: str, name: str, right: str, tmp_path: Path
) -> None:
    """The model and the corpus that are named here do not exist either: the name is said first."""
    none = str(tmp_path / "none")
    flags = ["--model", none, "--corpus", none, "--ds_config", none, f"--{flag}", name]
    with pytest.raises(UserError, match=rf"--{flag} {name}: .* Did you mean {right}\?"):
        check_inputs(read_config(flags), single_process())
