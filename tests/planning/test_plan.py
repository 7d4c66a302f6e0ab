"""The command as a user runs it: what fits, what is recommended, weak scaling, and mistakes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.objectives.methods import METHODS
from dga_scale.planning.cli import main
from dga_scale.planning.gpus import GPUS
from dga_scale.planning.plan import Cluster, Planner, make_planner
from dga_scale.planning.report import PURPOSES
from dga_scale.zero.ds_keys import load_ds_config

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def arguments(model: str, gpus: int, *more: str, config: str = "zero2", gpu: str = "h100") -> list[str]:
    path = str(CONFIGS / f"{config}.json")
    return ["--model", model, "--gpus", str(gpus), "--gpu", gpu, "--ds_config", path, *more]


def planner(model: str, gpus: int, *more: str, config: str = "zero2", gpu: str = "h100") -> Planner:
    path = str(CONFIGS / f"{config}.json")
    settings = read_config(["--corpus", "any", "--model", model, "--ds_config", path, *more])
    return make_planner(settings, load_ds_config(path), Cluster(gpus, 8, GPUS[gpu]), None)


def planned(capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, dict[str, Any]]:
    code = main([*given, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_small_model_fits_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, *arguments("roberta-base", 8, "--max_steps", "100"))
    assert code == 0
    assert found["planned"]["fits"]
    assert found["recommended"] == found["planned"]
    assert found["parameters"] == 124_697_433
    assert found["planned"]["tokens_per_step"] == 256 * 512
    assert found["planned"]["seconds"]["run"] == pytest.approx(100 * found["planned"]["seconds"]["step"])


def test_a_large_one_does_not_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    """10.7 B parameters under ZeRO-2 on 8 GPUs: 14/8 + 2 bytes each are 37 GiB, four views too much."""
    settings = ("--global_batch_size", "256", "--sequence_length", "512")
    code, found = planned(capsys, *arguments("xlm-roberta-xxl", 8, *settings))
    assert code == 1
    assert not found["planned"]["fits"]
    best = found["recommended"]
    assert best["fits"]
    assert best["micro_batch"] * best["accumulation"] * 8 == 256
    assert sum(best["device_bytes"].values()) <= found["room_bytes"]


def test_every_purpose_of_memory_is_explained() -> None:
    found = set()
    for method in (
        ["dga"],
        ["kd"],
        ["ewc", "--general_corpus", "x"],
        ["dga", "--contrast_scope", "global_batch"],
    ):
        for config in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
            for more in (["--bf16", "false"], ["--async_save", "true", "--gradient_checkpointing", "true"]):
                settings = ["--method", *method, *more, "--per_device_train_batch_size", "2"]
                used = planner("roberta-base", 8, *settings, config=config).as_configured().memory
                found |= {*used.device, *used.host}
    large = ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "true"]
    found |= {*planner("xlm-roberta-xl", 1, *large, config="zero3").as_configured().memory.device}
    assert found == {*PURPOSES}


def test_the_recommendation_is_the_largest_micro_batch_that_fits() -> None:
    plans = planner("roberta-large", 8, "--global_batch_size", "1024", gpu="a100-40gb")
    best = plans.recommended()
    assert best is not None
    larger = best.choice.micro_batch * 2
    for stage in range(4):
        choice = type(best.choice)(stage, larger, best.choice.checkpointing)
        assert not plans.of(choice, 1024, 8).fits


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("llama-70b", 8, "--method", "mlm", "--global_batch_size", "8")) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "Nothing fits" in out
    assert "offload" in out.lower()


def test_a_measured_mfu_takes_the_place_of_the_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        planned(capsys, *arguments("roberta-base", 1, "--mfu", share))[1]["planned"]
        for share in ("0.4", "0.2")
    ]
    assert found[1]["seconds"]["compute"] == pytest.approx(2 * found[0]["seconds"]["compute"])
    assert found[0]["mfu"] == pytest.approx(0.4, rel=0.05)  # the optimizer's step besides


def test_offload_keeps_to_its_stages() -> None:
    best = planner("xlm-roberta-xl", 8, config="zero3_offload").recommended()
    assert best is not None
    assert best.choice.stage == 3
    assert set(best.memory.host) == {"weights", "master weights", "moments", "gradients", "movement"}


def test_recomputing_is_recommended_where_fewer_passes_pay_for_it() -> None:
    """70 B parameters over a network card each, in each pass: 16 rows at once beat 16 passes of one."""
    settings = ("--method", "dga", "--global_batch_size", "512")
    plans = planner("llama-70b", 8, *settings, config="zero3_offload")
    plans = dataclasses.replace(plans, cluster=Cluster(8, 1, GPUS["h100"]))
    best = plans.recommended()
    assert best is not None
    assert best.choice.checkpointing
    kept = plans.of(dataclasses.replace(best.choice, micro_batch=1, checkpointing=False), 512, 8)
    assert kept.fits
    assert best.time.step < kept.time.step


def test_weak_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, *arguments("roberta-base", 8, "--scaling"))
    assert code == 0
    rows = found["scaling"]
    assert [row["gpus"] for row in rows[::4]] == [2**power for power in range(11)]
    for row in rows:
        assert row["micro_batch"] == found["planned"]["micro_batch"]
        calls = ("reductions", "updates", "gathers", "contrasts")
        sent = sum(size for name, size in row["traffic_bytes"].items() if name not in ("host", *calls))
        assert (sent == 0) == (row["gpus"] == 1)
    contrast = [row["traffic_bytes"]["contrast"] for row in rows[::4]]
    assert contrast[10] / contrast[9] == pytest.approx(1023 / 511)  # grows with the ranks, all else does not
    assert main(arguments("roberta-base", 8, "--scaling")) == 0
    assert "contrast's gathers take more than 1% of a step" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_or_refused(method: str) -> None:
    needs = {"ewc": ["--general_corpus", "x"], "rehearsal": ["--mix", "x:0.1"], "kl": ["--mix", "x:0.1"],
             "cse": ["--mix", "x:0.1"], "das": ["--soft_mask", "update"]}  # fmt: skip
    given = ["--method", method, *needs.get(method, [])]
    if METHODS[method].needs_whole_model:
        with pytest.raises(UserError, match="depends on the text"):
            planner("roberta-base", 2, *given)
    else:
        assert planner("roberta-base", 2, *given).as_configured().memory.total > 0


@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_forgotten(method: str) -> None:
    """One that compares words has a teacher's."""
    module = __import__(METHODS[method].__module__, fromlist=["_"])
    base = __import__(METHODS[method].__mro__[1].__module__, fromlist=["_"])
    uses = {name for part in (module, base) for name in vars(part)}
    compares = METHODS[method].needs_teacher and "kl_divergence" in uses
    assert METHODS[method].compares_vocabulary == compares


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (arguments("roberta-base", 8, gpu="h10"), "Did you mean h100"),
        (arguments("roberta-base", 24), "does not divide into 1 micro-batches on each of 24 ranks"),
        (arguments("roberta-base", 0), "--gpus 0: must be at least 1"),
        (arguments("roberta-base", 8, "--mfu", "40"), "--mfu 40.0: must be a share"),
        (arguments("roberta-base", 8, "--sequence_length", "513"), "takes 2 to 512 tokens"),
        (arguments("roberta-base", 8, "--methd", "mlm"), "Did you mean"),
        (arguments("roberta-bas", 8), "Did you mean roberta-base"),
        (arguments("roberta-base", 8, config="zero9"), "No such file"),
    ],
)
def test_mistakes(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(given)
