"""The JSON and the flags brought together: who wins, what is refused, how batches divide."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import get_timers_config

from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.zero import ds_config
from dga_scale.zero.ds_config import ResolvedConfig, resolve_ds_config
from dga_scale.zero.ds_keys import load_ds_config
from tests.helpers.ranks import REPOSITORY
from tests.zero.test_ds_keys import TRAINER_STAGE_3

DATA = ["--model", "m", "--corpus", "c", "--ds_config", "ds.json"]


def config_of(flags: str) -> TrainConfig:
    return read_config([*DATA, *flags.split()])


def resolve(raw: dict[str, Any], flags: str = "", world_size: int = 2) -> ResolvedConfig:
    return resolve_ds_config(
        raw, config_of(flags), world_size=world_size, hidden_size=768, device=torch.device("cpu")
    )


def test_auto_everywhere_takes_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_config, "_supports_fp16", lambda device: True)
    flags = "--fp16 true --learning_rate 3e-5 --max_grad_norm 0.5 --global_batch_size 64 --adam_beta2 0.98"
    found = resolve(TRAINER_STAGE_3, flags + " --per_device_train_batch_size 8", world_size=4)
    assert (found.zero_stage, found.precision) == (3, "fp16")
    assert (found.offload_optimizer, found.offload_parameters) == (True, True)
    assert (found.micro_batch_size, found.accumulation_steps, found.global_batch_size) == (8, 2, 64)
    ds = found.ds_config
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (8, 2)
    assert (ds["train_batch_size"], ds["gradient_clipping"]) == (64, 0.5)
    assert ds["fp16"]["enabled"] is True
    assert ds["bf16"]["enabled"] is False
    # as transformers fills them in, from the hidden size
    zero = ds["zero_optimization"]
    assert zero["reduce_bucket_size"] == 768 * 768
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 768 * 768)
    assert zero["stage3_param_persistence_threshold"] == 7680
    assert "optimizer" not in ds
    assert "scheduler" not in ds
    assert ds["zero_force_ds_cpu_optimizer"] is False
    # WarmupLR is constant after the warm-up; the flag was not given
    assert found.config.optimization.lr_scheduler_type == "constant"
    assert found.config.optimization.learning_rate == 3e-5


def test_the_raw_configuration_is_left_as_it_is() -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    resolve(raw)
    assert raw == {"zero_optimization": {"stage": 2}}


def test_an_empty_configuration_gets_the_settings_defaults() -> None:
    found = resolve({})
    assert (found.zero_stage, found.precision, found.global_batch_size) == (0, "bf16", 256)
    assert found.ds_config["gradient_clipping"] == 1.0
    assert found.ds_config["bf16"] == {"enabled": True, "check_grad_overflow": True}


def test_no_clipping_is_written_out() -> None:
    """DeepSpeed clips at 1 where the key is left out."""
    assert resolve({}, "--max_grad_norm 0").ds_config["gradient_clipping"] == 0.0


def test_a_number_in_the_json_wins_over_a_default_and_reaches_the_settings() -> None:
    raw = {
        "gradient_clipping": 0.3,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 2e-5, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1},
        },
        "bf16": {"enabled": False},
    }
    found = resolve(raw)
    settings = found.config.optimization
    assert (settings.learning_rate, settings.adam_beta1, settings.adam_beta2) == (2e-5, 0.8, 0.95)
    assert (settings.adam_epsilon, settings.weight_decay, settings.max_grad_norm) == (1e-7, 0.1, 0.3)
    assert (settings.bf16, found.precision) == (False, "fp32")


@pytest.mark.parametrize(
    ("raw", "flags", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            "--max_grad_norm 0.5",
            r"gradient_clipping is 1.0, but --max_grad_norm is 0.5",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}},
            "--learning_rate 1e-4",
            r"optimizer.params.lr is 2e-05, but --learning_rate is 0.0001",
        ),
        ({"bf16": {"enabled": False}}, "--bf16 true", r"bf16.enabled is False, but --bf16 is True"),
        (
            {"train_batch_size": 32},
            "--global_batch_size 64",
            r"train_batch_size is 32, but --global_batch_size",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "--gradient_accumulation_steps 4",
            r"gradient_accumulation_steps is 2, but --gradient_accumulation_steps is 4",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "--lr_scheduler_type cosine",
            r"scheduler.type \(WarmupLR\) is constant, but --lr_scheduler_type is cosine",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500}}},
            "",
            r"scheduler.params.total_num_steps: 500 is fixed here. Write \"auto\" and use --max_steps",
        ),
        ({"scheduler": {"type": "OneCycle"}}, "", r"scheduler.type: OneCycle is not supported"),
        ({"optimizer": {"type": "Lamb"}}, "", r"optimizer.type: Lamb is not supported"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "",
            r"optimizer.type: Adam is not",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "", r"both are enabled"),
        ({}, "--bf16 true --fp16 true", r"both are enabled"),
        ({"fp16": {"enabled": True}}, "", r"fp16 with ZeRO-0: DeepSpeed 0.19 divides the update"),
        ({"zero_optimization": {"stage": 4}}, "", r"there is no stage 4. Choose 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "", r'stage: "auto" has no meaning there. Choose 0, 1, 2'),
        (
            {"optimizer": {"params": {"lr": -0.01}}},
            "",
            r"params.lr: -0.01 must be above 0. Write that",
        ),
        ({"optimizer": {"params": {"lr": 0}}}, "", r"optimizer.params.lr: 0 must be above 0"),
        ({"optimizer": {"params": {"lr": True}}}, "", r"optimizer.params.lr: True is no number"),
        ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, "", r"betas: 1.0 must be from 0 to below 1"),
        ({"optimizer": {"params": {"betas": ["a", 0.9]}}}, "", r'betas: "a" must be a number'),
        ({"optimizer": {"params": {"weight_decay": -1}}}, "", r"weight_decay: -1 must be 0 or more"),
        ({"optimizer": {"params": {"eps": 0}}}, "", r"eps: 0 must be above 0"),
        ({"zero_optimization": {"stage": "two"}}, "", r"zero_optimization.stage: 'two' is no whole number"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "",
            r"offload_param.device: ZeRO-2 has nothing to offload there",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "",
            r"offload_optimizer.device: 'nvme' is not supported",
        ),
        (
            {"zero_optimization": {"sub_group_size": "auto"}},
            "",
            r'sub_group_size: "auto" has no meaning there',
        ),
        ({"communication_data_type": "auto"}, "", r'communication_data_type: "auto" has no meaning'),
        ({"gradient_clipping": -1}, "", r"gradient_clipping: -1 must be 0 or more"),
        ({"gradient_clipping": "1.0"}, "", r"gradient_clipping: '1.0' is no number"),
        ({"train_batch_size": 0}, "", r"train_batch_size: 0 must be at least 1"),
        ({"train_batch_size": True}, "", r"train_batch_size: True is no whole number"),
    ],
)
def test_contradictions_and_what_is_not_supported(raw: dict[str, Any], flags: str, message: str) -> None:
    with pytest.raises(UserError, match=f"ds.json: .*{message}"):
        resolve(raw, flags)


def test_the_same_number_twice_is_no_contradiction() -> None:
    assert resolve({"gradient_clipping": 0.5}, "--max_grad_norm 0.5").ds_config["gradient_clipping"] == 0.5


def test_fp16_is_refused_where_the_device_can_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_config, "_supports_fp16", lambda device: False)
    with pytest.raises(UserError, match=r"the device \(cpu\) can't compute in it. Use --bf16 true"):
        resolve({"zero_optimization": {"stage": 2}}, "--fp16 true")


@pytest.mark.parametrize(
    ("raw", "flags", "ranks", "expected"),
    [
        ({}, "--global_batch_size 64", 4, (16, 1, 64)),
        ({}, "--global_batch_size 64 --per_device_train_batch_size 4", 4, (4, 4, 64)),
        ({}, "--global_batch_size 64 --gradient_accumulation_steps 2", 4, (8, 2, 64)),
        ({}, "--per_device_train_batch_size 4 --gradient_accumulation_steps 3", 2, (4, 3, 24)),
        ({}, "--per_device_train_batch_size 32", 2, (32, 4, 256)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, "", 2, (8, 2, 32)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": "auto"}, "", 2, (16, 1, 32)),
        ({"train_batch_size": 32}, "--per_device_train_batch_size 4", 2, (4, 4, 32)),
    ],
)
def test_batch_sizes(raw: dict[str, Any], flags: str, ranks: int, expected: tuple[int, int, int]) -> None:
    found = resolve(raw, flags, ranks)
    assert (found.micro_batch_size, found.accumulation_steps, found.global_batch_size) == expected
    settings = found.config.optimization
    sizes = (
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        settings.global_batch_size,
    )
    assert sizes == expected


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        (
            "--global_batch_size 100",
            3,
            r"100 rows does not divide into 1 micro-batches on each of 3 ranks.*to 99 or 102",
        ),
        (
            "--global_batch_size 64 --per_device_train_batch_size 12",
            2,
            r"64 rows does not divide into micro-batches of 12 rows on each of 2 ranks.*to 48 or 72",
        ),
        ("--global_batch_size 2", 4, r"2 rows does not divide.*--global_batch_size to 4"),
        (
            "--global_batch_size 64 --per_device_train_batch_size 4 --gradient_accumulation_steps 4",
            2,
            r"4 rows a micro-batch x 4 gradient accumulation steps x 2 ranks = 32, not 64",
        ),
    ],
)
def test_batch_sizes_that_do_not_divide(flags: str, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve({}, flags, ranks)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_16_bit_gradients_are_summed_in_fp32(stage: int) -> None:
    """Over ranks always, over accumulation steps where DeepSpeed can: not in ZeRO-0."""
    raw: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    accumulation = "--gradient_accumulation_steps 4"
    several = resolve(raw, accumulation).ds_config
    assert several["communication_data_type"] == "fp32"
    assert several.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)
    assert "data_types" not in resolve(raw).ds_config
    for key in ("data_types", "communication_data_type"):
        assert key not in resolve(raw, f"{accumulation} --bf16 false").ds_config
    own = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    kept = resolve(raw | own, accumulation).ds_config
    assert {key: kept[key] for key in own} == own


def test_deepspeed_does_not_time_what_nothing_reads():
    """Its timer synchronizes the device twice a pass; whoever wants its lines says so."""
    assert get_timers_config(resolve({}).ds_config).enabled is False
    own = {"timers": {"throughput": {"enabled": True}}}
    assert resolve(own).ds_config["timers"] == own["timers"]


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_our_own_configurations_resolve(name: str) -> None:
    raw = load_ds_config(str(REPOSITORY / "ds_configs" / f"{name}.json"))
    found = resolve(raw)
    assert found.zero_stage == int(name[4])
    assert found.offload_optimizer == name.endswith("offload")
