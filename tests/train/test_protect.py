"""--protect through whole runs: FFN-only masks, what they log, and files of other kinds that are refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dga_scale.config.methods.shared import PriorImportanceSettings
from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.objectives.method import Method
from dga_scale.objectives.methods import METHODS
from dga_scale.preservation.importance import Importance
from dga_scale.train.protection import describe_errors
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, run_and_draw, run_training

FFN = ["--protect", "ffn_output", "ffn_intermediate"]
STEPS = 4


def flags_of(world: SmallWorld, run: Path, **settings: Any) -> list[str]:
    return arguments(world, run, max_steps=STEPS, soft_mask="update", **settings)


@pytest.fixture(scope="module")
def ffn_only(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DGA on two ranks that protects the FFN's units and no heads."""
    run = tmp_path_factory.mktemp("protect") / "run"
    assert run_ranks(2, run_and_draw, [*flags_of(world, run), *FFN]) == [0, 0]
    return run


def test_ffn_only_masks_are_one_flag(ffn_only: Path) -> None:
    importance = Importance.load(ffn_only / "importance.safetensors")
    assert {kind: tuple(values.shape) for kind, values in importance.values.items()} == {
        "ffn_intermediate": (2, 64),
        "ffn_output": (2, 32),
    }
    lines = [json.loads(line) for line in (ffn_only / "log.jsonl").read_text().splitlines()]
    records = [line for line in lines if line.get("event") == "protection"]
    assert [(record["step"], record["kind"]) for record in records] == [
        (step, kind) for step in (2, 4) for kind in ("ffn_intermediate", "ffn_output")
    ]
    for record in records:
        a = importance.protection()[record["kind"]]
        torch.testing.assert_close(torch.tensor(record["one_minus_a"]), 1 - a, rtol=0, atol=1e-4)
        assert record["applied_over_proposed"] == pytest.approx((1 - a).mean().item(), abs=1e-4)
        assert record["protected_units"] == int((a > 0.5).sum())
    assert {path.name for path in ffn_only.glob("importance-*")} == {
        "importance-ffn_intermediate.png",
        "importance-ffn_output.png",
    }
    errors = importance.standard_errors()
    records = [line for line in lines if line.get("event") == "importance"]
    assert [(record["step"], record["kind"], record["examples"]) for record in records] == [
        (0, kind, 64) for kind in errors
    ]
    for record in records:
        error, error_of_a = errors[record["kind"]]
        relative = error / importance.values[record["kind"]]
        torch.testing.assert_close(torch.tensor(record["relative_error"]), relative, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(record["error_of_a"]), error_of_a, rtol=0, atol=1e-4)
        assert record["largest_error_of_a"] == error_of_a.max().item()
    report = (ffn_only / "report.html").read_text()
    assert f"64 rows: largest standard error of a {records[0]['largest_error_of_a']:.2f}" in report
    assert "most protected ffn_intermediate" in report
    assert "heads" not in report


def test_importance_of_other_kinds_is_refused_before_the_model_is_read(
    ffn_only: Path, world: SmallWorld, tmp_path: Path
) -> None:
    prior = ["--prior_importance", str(ffn_only / "importance.safetensors")]
    flags = [*flags_of(world, tmp_path / "das", method="das"), *prior]
    with pytest.raises(
        RankError, match=r"importance of ffn_intermediate, ffn_output, not of heads.*--protect"
    ):
        run_ranks(1, run_training, flags)
    assert not (tmp_path / "das").exists()
    # Those that it holds can be protected by it; a file of more kinds would do, too.
    fewer = [*flags_of(world, tmp_path / "fewer", method="das"), *prior, "--protect", "ffn_output"]
    assert run_ranks(1, run_training, fewer) == [0]


@dataclass(frozen=True)
class OutsideSettings(PriorImportanceSettings):
    """Of a method that this test declares."""

    name: ClassVar = "outside"
    summary: ClassVar = "the LM loss, protected by what earlier domains need"


class Outside(Method[OutsideSettings]):
    """The LM loss alone, on masked FFN units."""

    Settings = OutsideSettings
    kinds = ("ffn_intermediate", "ffn_output")


def run_outside(flags: list[str]) -> int:
    METHODS.register(Outside)
    return run_training(flags)


def test_a_method_outside_of_the_package_is_protected_by_earlier_importances(
    ffn_only: Path, world: SmallWorld, tmp_path: Path
) -> None:
    prior = ffn_only / "importance.safetensors"
    flags = flags_of(world, tmp_path / "run", method="outside", prior_importance=prior)
    assert run_ranks(1, run_outside, flags) == [0]
    assert not (tmp_path / "run" / "importance.safetensors").exists()  # it measures none of its own
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    record = next(line for line in lines if line.get("event") == "protection")
    a = Importance.load(prior).protection()[record["kind"]]
    torch.testing.assert_close(torch.tensor(record["one_minus_a"]), 1 - a, rtol=0, atol=1e-4)
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/trainer_state.json")).read_text())
    assert len(state["prior_importance"]) == 1


def test_a_run_resumes_with_the_kinds_that_it_began_with(ffn_only: Path, world: SmallWorld) -> None:
    flags = [*flags_of(world, ffn_only), "--protect", "heads"]
    with pytest.raises(RankError, match="protect"):
        run_ranks(1, run_training, flags)


def test_importance_of_too_few_rows_says_how_many_are_enough() -> None:
    """The standard error of a mean falls with the root of the rows: 0.22 of 500 rows are 0.1 of 2,420."""
    assert describe_errors({"heads": 0.07, "ffn_output": 0.03}, 1500) == (
        "importance of 1,500 rows: largest standard error of a 0.07 (heads)"
    )
    said = describe_errors({"heads": 0.07, "ffn_output": 0.22}, 500)
    assert said.startswith("importance of 500 rows: largest standard error of a 0.22 (ffn_output); above 0.1")
    assert "about 2,420 rows are enough, raise --importance_samples" in said


def test_unknown_kinds_are_refused_with_the_nearest_right_name() -> None:
    for name, near in (
        ("ffn_outputs", "ffn_output"),
        ("head", "heads"),
        ("intermediate", "ffn_intermediate"),
    ):
        with pytest.raises(UserError, match=rf"--protect.*'{name}'.*Did you mean {near}\?"):
            read_config(["--ds_config=x.json", "--protect", "heads", name])
