"""DeepSpeed's JSON, read strictly: every key known and meaningful here, or refused with the nearest.

DeepSpeed itself lets a typo at the top level pass in silence, keeps ``"auto"`` as a string in some places and
drops it in others, and accepts features that this program does not work with.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.arguments import nearest
from dga_scale.errors import UserError

Keys = Mapping[str, Any]
"""The known keys of a section; the value is the section's own ``Keys``, or None where anything may stand."""

_FREE = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "communication_data_type prescale_gradients gradient_predivide_factor disable_allgather "
    "disable_python_gc steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level "
    "vocabulary_size zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
)
_REFUSED = {
    "activation_checkpointing": "recomputing activations is --gradient_checkpointing",
    "autotuning": "the program does not run under DeepSpeed's autotuner",
    "bfloat16": 'write "bf16"',
    "checkpoint": "checkpoints have a format of their own; --save_steps and --save_total_limit rule them",
    "compile": "the masks hook into gradients and optimizer steps, which DeepCompile replaces",
    "data_efficiency": "which sample comes when is fixed by the corpus and --seed",
    "dataloader_drop_last": "batches come from the corpus, not from DeepSpeed's loader",
    "datastates_ckpt": "checkpoints have a format of their own; --save_steps rules them",
    "expert_parallel": "only data parallelism is supported",
    "gradient_allreduce_op": "the loss is normalised for the mean over ranks",
    "hybrid_engine": "it is for generation",
    "managed_gradient_accumulation": "the program relies on DeepSpeed's accumulation",
    "pipeline": "only data parallelism is supported",
    "seq_parallel_communication_data_type": "only data parallelism is supported",
    "sequence_parallel_size": "only data parallelism is supported",
    "tensor_parallel": "only data parallelism is supported",
    "torch_autocast": 'use "bf16": weights in bfloat16 with float32 masters',
    "use_data_before_expert_parallelism": "only data parallelism is supported",
    "weight_quantization": "it is for inference",
}
_ONLY_VALUE = {
    "bf16.check_grad_overflow": (True, "a NaN would be trained on"),
    "bf16.bf16_master_weights_and_grads": (False, "the optimizer's weights stay float32"),
    "bf16.bf16_optimizer_states": (False, "the optimizer's moments stay float32"),
    "fp16.auto_cast": (False, "the inputs are token ids"),
    "fp16.fp16_master_weights_and_grads": (False, "the optimizer's weights stay float32"),
    "zero_optimization.compute_grad_norm": (True, "a NaN would be trained on"),
    "zero_optimization.cpu_offload": (None, 'write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": (None, 'write "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": (None, "write pin_memory inside offload_optimizer"),
    "zero_optimization.elastic_checkpoint": (False, "checkpoints load on any number of ranks without it"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has dropped it"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "part of the state would lie elsewhere"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it replaces the optimizer that is masked"),
    "zero_optimization.zenflow": (None, "it replaces the optimizer that is masked"),
    "zero_optimization.zero_hpz_partition_size": (1, "not tested with the masks"),
    "zero_optimization.zero_quantized_gradients": (False, "not tested with the masks"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "not tested with the masks"),
    "zero_optimization.zero_quantized_weights": (False, "not tested with the masks"),
}
"""Keys that may have one value only: that value, and why no other works here."""


def known_keys() -> Keys:
    """Collect the keys that may stand in the JSON, from DeepSpeed's model of a section where it has one."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    def of(*names: str) -> dict[str, Any]:
        return dict.fromkeys(names)

    def fields(model: Any) -> dict[str, Any]:
        return {field.alias or name: None for name, field in model.model_fields.items()}

    return of(*_FREE.split()) | {
        "optimizer": {
            "type": None,
            "params": of("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"),
        },
        "scheduler": of("type", "params"),
        "fp16": fields(DeepSpeedFP16Config),
        "bf16": fields(DeepSpeedBF16Config),
        "data_types": of("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
        "zero_optimization": fields(DeepSpeedZeroConfig)
        | {
            "offload_param": fields(DeepSpeedZeroOffloadParamConfig),
            "offload_optimizer": fields(DeepSpeedZeroOffloadOptimizerConfig),
        },
        "comms_logger": fields(CommsLoggerConfig),
        "flops_profiler": of(
            "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
            "output_file",
        ),
        "aio": of(
            "block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit",
            "overlap_events", "use_gds",
        ),
        "timers": {"throughput": fields(DeepSpeedThroughputTimerConfig)},
        "tensorboard": fields(TensorBoardConfig),
        "wandb": fields(WandbConfig),
        "csv_monitor": fields(CSVConfig),
        "comet": fields(CometConfig),
    }  # fmt: skip


def load_ds_config(path: str) -> dict[str, Any]:
    """Read DeepSpeed's JSON as it stands (``"auto"`` unresolved), after checking every key at every level.

    Raises:
        UserError: There is no such file, no JSON (with the line), a key that is unknown (with the line and
            the nearest right name), twice in a section, or asks for what does not work here (with the
            reason).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"--ds_config {path}: {reason}. Give DeepSpeed's JSON, for example ds_configs/zero2.json."
        ) from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        section = dict(pairs)
        if len(section) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"{path}:{_line(text, twice)}: {twice!r} stands twice in one section. Remove one."
            )
        return section

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}). "
            "No comments, no comma before a brace."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings. DeepSpeed's JSON is one object in braces.")

    def refuse(key: str, message: str) -> NoReturn:
        raise UserError(f"{path}:{_line(text, key.split('.')[-1])}: {message}")

    known = known_keys()
    for where, key, value, allowed in _walk(content, known, ""):
        dotted = f"{where}{key}"
        if dotted in _REFUSED:
            refuse(dotted, f"{dotted!r} can't be used here: {_REFUSED[dotted]}. Remove it.")
        if allowed is None or key not in allowed:
            near = nearest(key, allowed or known)
            elsewhere = "" if near or key not in known else " It belongs at the top level."
            refuse(dotted, f"unknown key {dotted!r}.{near}{elsewhere}")
        if isinstance(allowed[key], Mapping) and not isinstance(value, dict | None):
            refuse(dotted, f"{dotted!r} is {value!r}, and must be an object in braces.")
        only, reason = _ONLY_VALUE.get(dotted, (value, ""))
        if value not in (only, "auto"):
            refuse(dotted, f"{dotted!r}: {json.dumps(value)} can't be used here: {reason}. Remove it.")
    return content


def _walk(
    section: Mapping[str, Any], known: Keys | None, where: str
) -> Iterator[tuple[str, str, Any, Keys | None]]:
    """Yield every key as (path of its section, key, value, known keys of the section)."""
    for key, value in section.items():
        yield where, key, value, known
        inner = (known or {}).get(key)
        if isinstance(value, dict) and inner is not None:
            yield from _walk(value, inner, f"{where}{key}.")


def _line(text: str, key: str) -> int:
    """Return the number of the line on which a key first stands."""
    return next((n for n, line in enumerate(text.splitlines(), 1) if f'"{key}"' in line), 1)
