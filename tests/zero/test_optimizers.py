"""An optimizer added through the table: it trains under a mask, resumes to the last bit, and is planned."""

from pathlib import Path

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
from tests.test_train import arguments, losses, run_until


def sgd(groups: Groups, settings: OptimizationSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.adam_beta1)


SGD = OptimizerKind(torch.optim.SGD, sgd, moments=("momentum_buffer",))


def run_with_sgd(flags: list[str], stop_at: int) -> int:
    OPTIMIZERS["sgd"] = SGD
    try:
        return run_until([*flags, "--optimizer", "sgd"], stop_at, 0)
    finally:
        del OPTIMIZERS["sgd"]


def test_a_new_optimizer_trains_and_resumes_to_the_last_bit(world: SmallWorld, tmp_path: Path) -> None:
    def flags(run: str) -> list[str]:
        return arguments(
            world,
            tmp_path / run,
            soft_mask="update",
            learning_rate=0.1,
            max_eval_samples=16,
            check_invariants=1,
        )

    assert run_ranks(2, run_with_sgd, flags("whole"), -1) == [0, 0]
    assert run_ranks(2, run_with_sgd, flags("cut"), 2) == [EXIT_STOPPED, EXIT_STOPPED]
    assert run_ranks(2, run_with_sgd, flags("cut"), -1) == [0, 0]
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


def test_an_optimizer_that_does_not_exist_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    flags = [*arguments(world, tmp_path / "run", method="mlm"), "--optimizer", "lion"]
    with pytest.raises(UserError, match=r"--optimizer lion: .*adamw"):
        check_inputs(read_config(flags), single_process())
