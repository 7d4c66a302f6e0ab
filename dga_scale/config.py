"""Every setting of a training run: documented at the field, settable by flag or YAML, unknown names refused.

Flags win over the YAML file. ``TrainConfig.explicit`` holds the names that the user set, so that a number in
the DeepSpeed JSON is refused only where it contradicts something the user said, never a default.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from dga_scale.errors import UserError


def _setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSettings:
    """The language model."""

    model: str | None = _setting(
        None,
        "Folder or hub name of the pretrained model. Default: the demo's small BERT, made on first use.",
    )
    head_warmup_steps: int = _setting(
        0,
        "Steps that train only the LM head, before anything else, where the checkpoint has none "
        "(a sentence encoder, for example). 0: such a checkpoint is refused.",
    )
    head_warmup_learning_rate: float = _setting(1e-3, "Peak learning rate of the head warm-up.")
    dropout: float | None = _setting(
        None,
        "Overrides every dropout probability of the model. Needed by DGA where the model's own is 0 "
        "(ModernBERT, Llama): proxy KL and the contrast compare two dropout draws. Default: the model's own.",
    )
    attn_implementation: str | None = _setting(
        None,
        "Attention kernel as transformers names it (sdpa, flash_attention_2, eager). Default: its choice.",
    )
    gradient_checkpointing: bool = _setting(
        False, "Recompute activations in the backward pass: less memory, about a third more compute."
    )


@dataclass(frozen=True)
class DataSettings:
    """The text. Corpora are folders written by tools/shard_corpus.py."""

    corpus: str | None = _setting(None, "Folder of the domain corpus to train on. Default: the demo's.")
    eval_corpus: str | None = _setting(
        None, "Folder of held-out domain text. Default: the corpus's own held-out part (--validation_share)."
    )
    general_eval_corpus: str | None = _setting(
        None, "Folder of held-out general text: what the model should not forget. Default: not measured."
    )
    mlm_probability: float = _setting(
        0.15, "Share of a row's tokens that are masked; exactly round(p * tokens). Source: BERT, DGA."
    )
    mask_replace_prob: float = _setting(0.8, "Share of the masked positions that become the mask token.")
    random_replace_prob: float = _setting(0.1, "Share of the masked positions that become a random token.")
    max_eval_samples: int = _setting(2000, "Rows of each evaluation corpus that are scored (the first ones).")
    prefetch_steps: int = _setting(4, "Global batches prepared ahead in the background.")


@dataclass(frozen=True)
class MethodSettings:
    """What is learnt, and what is protected."""

    method: str = _setting(
        "dga", "dga: MLM + contrast with soft-masked attention heads; mlm: plain MLM.", ("dga", "mlm")
    )
    soft_mask: str = _setting(
        "gradient",
        "Where 1 - importance is applied. gradient: the papers' formula, which Adam largely undoes; "
        "update: on the step the optimizer makes, which does what the papers say; none. Source: DGA.",
        ("gradient", "update", "none"),
    )
    contrastive_weight: float = _setting(1.0, "Lambda, the weight of the contrastive loss. Source: DGA.")
    temperature: float = _setting(0.05, "Temperature of the contrastive loss. Source: DGA.")
    split_views: bool = _setting(
        False, "One trunk pass a view instead of one for all: less memory, the same numbers without dropout."
    )
    importance_samples: int = _setting(
        10_000,
        "Rows on which importance is measured before training (all of a smaller corpus). Source: DGA.",
    )
    importance_distribution: str = _setting(
        "vocabulary",
        "What the proxy KL compares: softmax over the vocabulary at sampled positions, over the hidden axis, "
        "or over positions (the released code).",
        ("vocabulary", "hidden", "sequence"),
    )
    importance_squash: str = _setting(
        "clip",
        "How negative values of tanh(z-score) become a protection: clip to 0, abs (the released code), "
        "or minmax within the layer.",
        ("clip", "abs", "minmax"),
    )
    kv_protection: str = _setting(
        "min",
        "Protection of a key/value head that query heads share: of the least, most or mean protected.",
        ("min", "max", "mean"),
    )


@dataclass(frozen=True)
class OptimizationSettings:
    """AdamW, its schedule and the batch. Names as in transformers' TrainingArguments."""

    max_steps: int = _setting(2500, "Optimizer steps. Source: DGA (640,000 sequences at 256).")
    global_batch_size: int = _setting(256, "Rows in one optimizer step, over all ranks. Source: DGA.")
    per_device_train_batch_size: int | None = _setting(
        None, "Rows in one forward pass of one rank. Default: the global batch over ranks and accumulation."
    )
    gradient_accumulation_steps: int | None = _setting(
        None,
        "Forward passes in one optimizer step. Default: what the two batch sizes give, 1 without the second.",
    )
    learning_rate: float = _setting(1e-4, "Peak learning rate. Source: DGA's released code.")
    lr_scheduler_type: str = _setting(
        "linear",
        "Decay after warm-up: linear or cosine to min_lr_ratio, constant, or warmup_stable_decay "
        "(constant, then 1 - sqrt over the last decay_ratio).",
        ("linear", "cosine", "constant", "warmup_stable_decay"),
    )
    warmup_ratio: float = _setting(0.1, "Share of the steps in which the learning rate rises. Source: DGA.")
    decay_ratio: float = _setting(0.2, "Share of the steps in which warmup_stable_decay decays.")
    min_lr_ratio: float = _setting(0.0, "Learning rate at the end over the peak.")
    weight_decay: float = _setting(0.0, "AdamW's weight decay. Source: DGA's released code.")
    adam_beta1: float = _setting(0.9, "AdamW's beta1.")
    adam_beta2: float = _setting(0.999, "AdamW's beta2.")
    adam_epsilon: float = _setting(1e-6, "AdamW's epsilon. Source: DGA's released code.")
    max_grad_norm: float = _setting(1.0, "Gradient norm above which gradients are scaled down; 0: off.")
    bf16: bool = _setting(
        True, "bfloat16 weights in the passes, float32 in the optimizer. False: all float32."
    )
    fp16: bool = _setting(False, "float16 with loss scaling instead of bf16 (ZeRO 1 to 3, on a GPU).")
    max_bad_steps: int = _setting(
        10, "Steps in a row refused for a NaN or infinity after which the run stops."
    )


@dataclass(frozen=True)
class RunSettings:
    """Where a run lies, what it says and when it saves."""

    ds_config: str | None = _setting(None, "DeepSpeed's JSON, for example ds_configs/zero2.json. Needed.")
    output_dir: str | None = _setting(None, "The run's folder. Default: runs/METHOD-CORPUS.")
    resume: str = _setting(
        "auto",
        "auto: go on from the newest complete checkpoint of output_dir; never: refuse a folder with one; "
        "or the path of a checkpoint.",
    )
    seed: int = _setting(42, "Seed of the order, the masks and dropout.")
    logging_steps: int = _setting(1, "Steps between log lines and TensorBoard points.")
    protection_steps: int = _setting(
        50, "Steps between records of effective protection: how far each head moved against 1 - importance."
    )
    eval_steps: int = _setting(
        500, "Steps between evaluations; also before the first and after the last step."
    )
    save_steps: int = _setting(500, "Steps between checkpoints; also after the last step.")
    save_total_limit: int = _setting(2, "Checkpoints kept; older ones are removed. 0: all.")
    dry_run: bool = _setting(
        False, "Build everything, run one step of the real shapes, print what it needs, and stop."
    )
    # deepspeed's launcher passes it to every program; the environment says the same, so nothing reads it.
    local_rank: int = _setting(-1, "Set by the deepspeed launcher; ignored, the environment says it too.")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. ``explicit``: the names that came from a flag or the YAML file."""

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    optimization: OptimizationSettings
    run: RunSettings
    explicit: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """One flat dictionary, as in the YAML file; without what a launcher sets."""
        groups = (self.model, self.data, self.method, self.optimization, self.run)
        flat = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        del flat["local_rank"]
        return flat

    def replace(self, **values: Any) -> "TrainConfig":
        """A copy with settings changed by their flat names."""
        groups: dict[str, Any] = {"explicit": self.explicit}
        for group_name in ("model", "data", "method", "optimization", "run"):
            group = getattr(self, group_name)
            own = {f.name: values.pop(f.name) for f in fields(group) if f.name in values}
            groups[group_name] = dataclasses.replace(group, **own)
        assert not values, f"unknown settings {sorted(values)}"
        return TrainConfig(**groups)


GROUPS: tuple[Any, ...] = (ModelSettings, DataSettings, MethodSettings, OptimizationSettings, RunSettings)
SETTING_NAMES = tuple(f.name for group in GROUPS for f in fields(group))


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` where a known name is near, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


class _Parser(HfArgumentParser):
    """Errors as ours: one line, the nearest right name, no usage text of 80 lines before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def build_parser(prog: str = "dga-train") -> HfArgumentParser:
    """The parser of all settings, with a section in ``--help`` for each group."""
    parser = _Parser(
        list(GROUPS),
        prog=prog,
        description="Adapt a pretrained language model to a domain and keep what it knows.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Settings as YAML, by the names below. Flags win."
    )
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Settings from command-line arguments and the YAML file they name.

    Raises:
        UserError: unknown name (with the nearest right one), a value of the wrong type or out of range,
            a YAML file that is missing or not a mapping.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for argument in arguments:
        name = _name(argument)
        if argument.startswith("--") and name not in {*SETTING_NAMES, "config", "help"}:
            raise UserError(f"unknown setting --{name}.{nearest(name, SETTING_NAMES)} See --help.")
    from_file = _yaml_arguments(_value_of("--config", arguments))
    parser = build_parser()
    model, data, method, optimization, run, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no setting. Write --name value. See --help.")
    explicit = {_name(a) for a in [*from_file, *arguments] if a.startswith("--")}
    settings = frozenset(explicit & set(SETTING_NAMES))
    config = TrainConfig(model, data, method, optimization, run, settings)
    _check_values(config)
    return config


def _name(argument: str) -> str:
    """``--max-steps=3`` -> ``max_steps``: dashes and underscores mean the same."""
    return argument.split("=", 1)[0].removeprefix("--").replace("-", "_")


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def _yaml_arguments(path: str | None) -> list[str]:
    """The YAML file's settings as command-line arguments, so that one parser converts and checks both."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no settings. Write one `name: value` a line.")
    arguments = []
    for name, value in content.items():
        if name not in SETTING_NAMES:
            raise UserError(f"{path}: unknown setting {name!r}.{nearest(str(name), SETTING_NAMES)}")
        if value is None:
            continue
        if isinstance(value, dict | list):
            raise UserError(f"{path}: {name} must be one value, not {json.dumps(value)}.")
        arguments.append(f"--{name}={value}")
    return arguments


def _check_values(config: TrainConfig) -> None:
    """Ranges, before any long work starts."""
    flat = config.as_dict()

    def refuse(name: str, rule: str) -> NoReturn:
        raise UserError(f"--{name} {flat[name]}: must be {rule}.")

    for name in ("max_steps", "global_batch_size", "importance_samples", "logging_steps", "eval_steps",
                 "save_steps", "protection_steps", "prefetch_steps", "max_eval_samples", "max_bad_steps",
                 "per_device_train_batch_size", "gradient_accumulation_steps"):  # fmt: skip
        if flat[name] is not None and flat[name] < 1:
            refuse(name, "at least 1")
    for name in (
        "head_warmup_steps",
        "save_total_limit",
        "weight_decay",
        "contrastive_weight",
        "max_grad_norm",
    ):
        if flat[name] < 0:
            refuse(name, "0 or more")
    for name in ("temperature", "adam_epsilon", "learning_rate", "head_warmup_learning_rate"):
        if not flat[name] > 0:
            refuse(name, "above 0")
    for name in ("mask_replace_prob", "random_replace_prob", "warmup_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0 <= flat[name] <= 1:
            refuse(name, "from 0 to 1")
    for name in ("adam_beta1", "adam_beta2", "dropout"):
        if flat[name] is not None and not 0 <= flat[name] < 1:
            refuse(name, "from 0 to below 1")
    if not 0 < flat["mlm_probability"] < 1:
        refuse("mlm_probability", "between 0 and 1")
    if flat["mask_replace_prob"] + flat["random_replace_prob"] > 1:
        refuse("random_replace_prob", f"at most 1 - mask_replace_prob ({1 - flat['mask_replace_prob']:g})")
    if flat["warmup_ratio"] + flat["decay_ratio"] > 1 and flat["lr_scheduler_type"] == "warmup_stable_decay":
        refuse("decay_ratio", f"at most 1 - warmup_ratio ({1 - flat['warmup_ratio']:g})")
    if flat["ds_config"] is None:
        raise UserError(
            "--ds_config is needed: DeepSpeed's JSON, for example --ds_config ds_configs/zero2.json."
        )
    if (flat["model"] is None) != (flat["corpus"] is None):
        missing = "corpus" if flat["corpus"] is None else "model"
        raise UserError(
            f"--{missing} is missing. Give both --model and --corpus, or neither for the built-in demo."
        )
