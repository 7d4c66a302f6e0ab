"""DeepSpeed's JSON, read strictly: every key known and meaningful here, or refused with the nearest.

DeepSpeed itself lets a typo at the top level pass in silence, keeps ``"auto"`` as a string in some places and
drops it in others, and accepts features that this program does not work with.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

from pydantic import TypeAdapter, ValidationError

from dga_scale.config.arguments import nearest
from dga_scale.config.declaration import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Rule, is_text, shown
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import json_problem

Check = Callable[[Any], str | None]
"""What says what a value has to be; None where it is that."""

Keys = Mapping[str, Any]
"""The known keys of a section; the value is the section's own ``Keys``, or the ``Check`` of a value."""


def _anything(value: Any) -> str | None:
    """Accept what ``resolve_ds_config`` checks, by the rule of the setting that it stands for."""
    return None


def _simple(value: Any) -> str | None:
    return "a number, text, or true or false" if isinstance(value, dict | list | None) else None


def _truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _number(rule: Rule, whole: bool = False) -> Check:
    kinds, words = ((int,), "a whole number") if whole else ((int, float), "a number")

    def check(value: Any) -> str | None:
        right = isinstance(value, kinds) and not isinstance(value, bool) and rule.holds(value)
        return None if right else f"{words}, {rule.words}"

    return check


def _names(value: Any) -> str | None:
    right = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return None if right else "a list of names"


def _path(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a path"


def _one_of(*names: str | None) -> Check:
    return lambda value: None if value in names else f"one of {', '.join(filter(None, names))}"


def _field(field: Any) -> Check:
    """Return the check of a field of one of DeepSpeed's models, which itself takes "false" for a truth."""
    limits = field.metadata
    kind: Any = Annotated[(field.annotation, *limits)] if limits else field.annotation
    adapter = TypeAdapter(kind)
    truth = bool in (field.annotation, *get_args(field.annotation))

    def check(value: Any) -> str | None:
        if value is not None and truth != isinstance(value, bool):
            return "true or false" if truth else "no truth value"
        if isinstance(value, int | float) and value < 0 and field.default != value:
            return "0 or more"
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            said: str = error.errors()[0]["msg"]
            return said.removeprefix("Input should be ")
        except (TypeError, ValueError) as error:  # of a validator of DeepSpeed's own
            return str(error)
        return None

    return check


_TOP: Keys = {
    "train_batch_size": _anything,
    "train_micro_batch_size_per_gpu": _anything,
    "gradient_accumulation_steps": _anything,
    "gradient_clipping": _anything,
    "communication_data_type": _one_of("fp32", "fp16", "bf16", None),
    "prescale_gradients": _truth,
    "gradient_predivide_factor": _number(ABOVE_0),
    "disable_allgather": _truth,
    "disable_python_gc": _truth,
    "steps_per_print": _number(AT_LEAST_1, whole=True),
    "wall_clock_breakdown": _truth,
    "memory_breakdown": _truth,
    "dump_state": _truth,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "vocabulary_size": _number(AT_LEAST_1, whole=True),
    "zero_allow_untested_optimizer": _truth,
    "zero_force_ds_cpu_optimizer": _truth,
}
_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""The package that each of DeepSpeed's monitors writes through."""
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
    "aio.use_gds": (False, "nothing is offloaded to disks"),
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


@cache
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

    def of(*names: str, check: Check = _simple) -> dict[str, Any]:
        return dict.fromkeys(names, check)

    def fields(model: Any) -> dict[str, Any]:
        return {field.alias or name: _field(field) for name, field in model.model_fields.items()}

    return {
        **_TOP,
        "optimizer": {
            "type": _simple,
            "params": of("lr", "betas", "eps", "weight_decay", check=_anything)
            | of("torch_adam", "adam_w_mode", check=_truth),
        },
        "scheduler": {
            "type": _simple,
            "params": lambda value: None if isinstance(value, dict) else "an object in braces",
        },
        "fp16": fields(DeepSpeedFP16Config),
        "bf16": fields(DeepSpeedBF16Config),
        "data_types": of("grad_accum_dtype", check=_one_of("fp32", "fp16", "bf16", None))
        | of("param_dtype", "buffer_dtype", check=_one_of("fp32", "fp16", "bf16", None))
        | of("keep_in_fp32_modules", check=_names),
        "zero_optimization": fields(DeepSpeedZeroConfig)
        | {
            "stage": _anything,
            "offload_param": fields(DeepSpeedZeroOffloadParamConfig),
            "offload_optimizer": fields(DeepSpeedZeroOffloadOptimizerConfig),
        },
        "comms_logger": fields(CommsLoggerConfig) | of("prof_ops", check=_names),
        "flops_profiler": of("enabled", "detailed", check=_truth)
        | of("profile_step", "top_modules", check=_number(AT_LEAST_1, whole=True))
        | of("module_depth", check=_number(Rule(lambda depth: depth >= -1, "-1 or more"), whole=True))
        | of("recompute_fwd_factor", check=_number(AT_LEAST_0))
        | of("output_file", check=_path),
        "aio": of("single_submit", "overlap_events", "use_gds", check=_truth)
        | of(
            "block_size", "queue_depth", "intra_op_parallelism", "thread_count",
            check=_number(AT_LEAST_1, whole=True),
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
            reason); a value of another kind or out of range.
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

    def constant(name: str) -> NoReturn:
        raise UserError(f'{path}:{_line(text, name)}: {name} is no number in JSON. Write one, or "auto".')

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}). "
            "No comments, no comma before a brace."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {json_problem(error)}.") from None
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
        if isinstance(allowed[key], Mapping):
            words = None if isinstance(value, dict) else "an object in braces"
        elif isinstance(value, float) and not math.isfinite(value):
            words = "a finite number"
        elif isinstance(value, int) and abs(value) >= 2**63:
            words = "a number below 2^63"
        elif isinstance(value, str) and not is_text(value):
            words = "text, without NUL or halves of characters"
        else:
            words = None if value == "auto" else allowed[key](value)
        if words:
            refuse(dotted, f"{dotted!r} is {shown(value)}, and must be {words}.")
        only, reason = _ONLY_VALUE.get(dotted, (value, ""))
        if value not in (only, "auto"):
            refuse(dotted, f"{dotted!r}: {shown(value)} can't be used here: {reason}. Remove it.")
    for section, package in _MONITORS.items():
        if content.get(section, {}).get("enabled") is True and find_spec(package) is None:
            refuse(
                f"{section}.enabled", f"{package} is not installed. pip install {package}, or switch it off."
            )
    return content


def _walk(
    section: Mapping[str, Any], known: Keys | None, where: str
) -> Iterator[tuple[str, str, Any, Keys | None]]:
    """Yield every key as (path of its section, key, value, known keys of the section)."""
    for key, value in section.items():
        yield where, key, value, known
        inner = (known or {}).get(key)
        if isinstance(value, dict) and isinstance(inner, Mapping):
            yield from _walk(value, inner, f"{where}{key}.")


def _line(text: str, key: str) -> int:
    """Return the number of the line on which a key, or else a word, first stands."""
    lines = list(enumerate(text.splitlines(), 1))
    named = (n for word in (f'"{key}"', key) for n, line in lines if word in line)
    return next(named, 1)
