"""DeepSpeed's JSON read strictly: what is refused, with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from dga_scale.errors import UserError
from dga_scale.zero.ds_keys import known_keys, load_ds_config
from tests.helpers.ranks import REPOSITORY


def written(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return str(path)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_our_own_configurations_are_accepted(name: str) -> None:
    path = REPOSITORY / "ds_configs" / f"{name}.json"
    assert load_ds_config(str(path)) == json.loads(path.read_text())


TRAINER_STAGE_3 = {  # the example of transformers' documentation
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_the_configuration_of_a_trainer_user_is_accepted(tmp_path: Path) -> None:
    assert load_ds_config(written(tmp_path, TRAINER_STAGE_3)) == TRAINER_STAGE_3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"gradient_cliping": 1.0},
            r"ds.json:2: unknown key 'gradient_cliping'. Did you mean gradient_clipping",
        ),
        ({"zero_optimisation": {}}, r"Did you mean zero_optimization"),
        ({"bf16": {"enable": True}}, r"ds.json:3: unknown key 'bf16.enable'. Did you mean enabled"),
        ({"zero_optimization": {"stages": 2}}, r"'zero_optimization.stages'. Did you mean stage\?"),
        (
            {"zero_optimization": {"offload_optimizer": {"pin_memry": True}}},
            r"ds.json:4: .*'zero_optimization.offload_optimizer.pin_memry'. Did you mean pin_memory",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}},
            r"'optimizer.params.learning_rate'",
        ),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, r"It belongs at the top level"),
        ({"activation_checkpointing": {}}, r"--gradient_checkpointing"),
        ({"tensor_parallel": {}}, r"only data parallelism"),
        (
            {"bf16": {"check_grad_overflow": False}},
            r"'bf16.check_grad_overflow': false.*a NaN would be trained on",
        ),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, r"not tested with the masks"),
        ({"zero_optimization": {"cpu_offload": True}}, r'write "offload_optimizer"'),
        ({"zero_optimization": True}, r"'zero_optimization' is true, and must be an object"),
        ({"zero_optimization": None}, r"'zero_optimization' is null, and must be an object in braces"),
        ({"optimizer": {"params": None}}, r"'optimizer.params' is null, and must be an object in braces"),
        ({"scheduler": {"params": [1]}}, r"'scheduler.params' is \[1\], and must be an object in braces"),
        (
            {"bf16": {"enabled": "false"}},
            r"ds.json:3: 'bf16.enabled' is .false., and must be true or false",
        ),
        ({"bf16": {"enabled": 1}}, r"'bf16.enabled' is 1, and must be true or false"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"reduce_bucket_size' is 0, .* greater than 0"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, r"reduce_bucket_size' is 0.5, .* valid integer"),
        (
            {"zero_optimization": {"reduce_bucket_size": True}},
            r"bucket_size' is true, .*no truth value",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameters": -1}},
            r"live_parameters' is -1, .*0 or more",
        ),
        ({"fp16": {"loss_scale_window": -5}}, r"'fp16.loss_scale_window' is -5, and must be 0 or more"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
            r"device' is .disk., and must be",
        ),
        ({"steps_per_print": 0}, r"'steps_per_print' is 0, and must be a whole number, at least 1"),
        ({"steps_per_print": "often"}, r"'steps_per_print' is .often., and must be a whole"),
        ({"wall_clock_breakdown": None}, r"'wall_clock_breakdown' is null, and must be true or false"),
        ({"communication_data_type": "int8"}, r"and must be one of fp32, fp16, bf16"),
        (
            {"flops_profiler": {"profile_step": []}},
            r"'flops_profiler.profile_step' is .*, and must be a whole number",
        ),
        ('{"gradient_clipping":\n NaN}', r"ds.json:2: NaN is no number in JSON"),
        ('{"gradient_clipping": 1e999}', r"'gradient_clipping' is Infinity, and must be a finite number"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", r"ds.json: not JSON: Exceeds the limit"),
        ("[" * 10**5, r"ds.json: not JSON: it is nested too deeply"),
        (
            {"comet": {"enabled": True}},
            r"ds.json:3: comet_ml is not installed. pip install comet_ml, or switch",
        ),
        ('{"fp16": {},\n"fp16": {}}', r"ds.json:1: 'fp16' stands twice"),
        ('{\n"train_batch_size": 8,\n}', r"ds.json:3: not JSON"),
        ('{\n// a comment\n"train_batch_size": 8}', r"ds.json:2: not JSON.*No comments"),
        ("[]", r"holds no settings"),
    ],
)
def test_what_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_ds_config(written(tmp_path, content))


def test_a_missing_file_and_a_binary_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json: No such file or directory. Give DeepSpeed's JSON"):
        load_ds_config(str(tmp_path / "nothing.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_ds_config(str(tmp_path / "binary.json"))


def test_deepspeed_takes_every_key_of_its_sections_that_we_take() -> None:
    """Guards against a section's model that has moved in a newer DeepSpeed."""
    known = known_keys()
    assert {"stage", "overlap_comm", "stage3_prefetch_bucket_size"} <= set(known["zero_optimization"])
    assert {"device", "pin_memory"} <= set(known["zero_optimization"]["offload_optimizer"])
    assert {"enabled", "initial_scale_power"} <= set(known["fp16"])


def test_the_stage_is_left_to_the_resolver(tmp_path: Path) -> None:
    """DeepSpeed's own words name a stage twice."""
    assert load_ds_config(written(tmp_path, {"zero_optimization": {"stage": 4}}))
