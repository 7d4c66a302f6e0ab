"""Methods that keep general knowledge by general text or by the starting weights, as whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from dga_scale.launch.preemption import EXIT_STOPPED
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import REPOSITORY, arguments, run_training, run_until


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def flags_of(world: SmallWorld, run: Path, method: str, **settings: Any) -> list[str]:
    own = {
        "l2": {"l2_weight": 50.0},
        "ewc": {"ewc_weight": 50.0, "general_corpus": world.general_corpus, "fisher_samples": 20},
        "rehearsal": {"mix": f"{world.general_corpus}:0.3", "rehearsal_weight": 0.5},
        "kl": {"mix": f"{world.general_corpus}:0.3", "kl_mlm_weight": 0.5},
    }[method]
    return arguments(world, run, method=method, **own, **settings)


def test_a_regularised_run_resumes_on_another_number_of_ranks(world: SmallWorld, tmp_path: Path) -> None:
    """Without dropout it computes the same, to the order of sums in fp32; the Fisher is read back."""
    ds_config = REPOSITORY / "ds_configs" / "zero3.json"
    whole, parts = (
        flags_of(world, tmp_path / name, "ewc", ds_config=ds_config, dropout=0.0)
        for name in ("whole", "parts")
    )
    assert run_ranks(2, run_training, whole) == [0, 0]
    assert run_ranks(2, run_until, parts, 3, 1) == [EXIT_STOPPED] * 2
    assert run_ranks(1, run_training, parts) == [0]
    one, other = (steps_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss/total", "loss/weight_regularisation"):
        assert [step[name] for step in other] == pytest.approx([step[name] for step in one], rel=1e-3)


@pytest.mark.parametrize("method", ["rehearsal", "kl"])
def test_a_method_that_needs_a_mix_says_so(method: str, world: SmallWorld, tmp_path: Path) -> None:
    flags = [flag for flag in flags_of(world, tmp_path, method) if not flag.startswith("--mix")]
    with pytest.raises(RankError, match="--mix"):
        run_ranks(1, run_training, flags)
