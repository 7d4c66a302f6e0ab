"""The settings of a training run that every method has; a method's own are declared in ``config.methods``.

``TrainConfig.explicit`` holds the names that the user set, so that a number in the DeepSpeed JSON is refused
only where it contradicts something the user gave, never a default.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dga_scale.config.declaration import (
    ABOVE_0,
    ABOVE_0_TO_1,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    INSIDE_0_1,
    SEED,
    SHARE,
    Setting,
    declared,
    flag_name,
    setting,
)
from dga_scale.config.user_code import HELP

DECAYS = ("linear", "cosine", "constant", "warmup_stable_decay")
"""The forms of the learning rate's decay, ``--lr_scheduler_type``."""


@dataclass(frozen=True)
class ModelSettings:
    """The language model."""

    model: str | None = setting(
        None,
        "Folder or hub name of the pretrained model. Default: the demo's small BERT, made on first use.",
        refers="model",
    )
    random_init: bool = setting(
        False, "Start from random weights of the model's architecture: pretraining from scratch."
    )
    import_: list[str] | None = setting(None, HELP, refers="file")
    head_warmup_steps: int = setting(
        0,
        "Steps that train only the LM head, before anything else, where the checkpoint has none "
        "(a sentence encoder, for example). 0: such a checkpoint is refused.",
        rule=AT_LEAST_0,
    )
    head_warmup_learning_rate: float = setting(1e-3, "Peak learning rate of the head warm-up.", rule=ABOVE_0)
    dropout: float | None = setting(
        None,
        "Overrides every dropout probability of the model. Needed by DGA where the model's own is 0 "
        "(ModernBERT, Llama): proxy KL and the contrast compare two dropout draws. Default: the model's own.",
        rule=BELOW_1,
    )
    attn_implementation: str | None = setting(
        None,
        "Attention kernel as transformers names it (sdpa, flash_attention_2, eager). Default: its choice.",
        affects="speed",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, about a third more compute.",
        affects="speed",
    )
    split_views: bool = setting(
        False,
        "One forward pass for each view of a batch that the method needs, instead of one for all: less "
        "memory, the same numbers without dropout.",
        affects="speed",
    )


@dataclass(frozen=True)
class DataSettings:
    """The text. Corpora are folders written by tools/shard_corpus.py."""

    corpus: list[str] | None = setting(
        None,
        "Folder of the domain corpus to train on. Several: one after the other, each from the weights that "
        "the last left, with its own optimizer and schedule (a DAS sequence). Default: the demo's.",
        refers="corpus",
    )
    mix: list[str] | None = setting(
        None,
        "Corpora mixed into every batch, as FOLDER:SHARE, the share counted in tokens "
        "(general/:0.05 replays a twentieth of general text). The domain corpus gets the rest.",
        refers="corpus:share",
    )
    eval_corpus: str | None = setting(
        None,
        "Folder of held-out domain text. Default: the corpus's own held-out part (--validation_share).",
        affects="evaluation",
        refers="corpus",
    )
    general_eval_corpus: str | None = setting(
        None,
        "Folder of held-out general text: what the model should not forget. Default: not measured.",
        affects="evaluation",
        refers="corpus",
    )
    also_evaluate: list[str] | None = setting(
        None,
        "Further held-out corpora, as NAME=FOLDER; their losses are logged under the name.",
        affects="evaluation",
        refers="name=corpus",
    )
    mlm_probability: float = setting(
        0.15,
        "Share of a row's tokens that are masked; exactly round(p * tokens).",
        rule=INSIDE_0_1,
        source="BERT, DGA",
    )
    mask_replace_prob: float = setting(
        0.8, "Share of the masked positions that become the mask token.", rule=SHARE
    )
    random_replace_prob: float = setting(
        0.1, "Share of the masked positions that become a random token.", rule=SHARE
    )
    max_eval_samples: int = setting(
        2000,
        "Rows of each evaluation corpus that are scored: a random sample, always the same.",
        rule=AT_LEAST_1,
        affects="evaluation",
    )
    prefetch_steps: int = setting(
        4, "Global batches prepared ahead in the background.", rule=AT_LEAST_1, affects="speed"
    )


@dataclass(frozen=True)
class MethodSettings:
    """A method's own settings; ``config.methods`` has a subclass for each method."""

    name: ClassVar[str]
    """The name that ``--method`` takes."""
    summary: ClassVar[str]
    """The method's line in ``--help``."""
    dense_warmup_setting: ClassVar[str] = ""
    """The setting that ``dense_warmup_steps`` is read from, as messages name it."""

    @property
    def dense_warmup_steps(self) -> int:
        """The steps of a run of the dense model (LM loss) that goes before the method's own; 0: none."""
        return 0

    def without_dense_warmup(self) -> "MethodSettings":
        """Return the settings of the method's own run, which starts from the dense run's model."""
        return self


@dataclass(frozen=True)
class OptimizationSettings:
    """AdamW, its schedule and the batch. Names as in transformers' TrainingArguments."""

    max_steps: int = setting(
        2500,
        "Optimizer steps. A larger number extends a run whose steps would have had the same learning "
        "rates (constant, warmup_stable_decay before its decay).",
        rule=AT_LEAST_1,
        source="DGA (640,000 sequences at 256)",
    )
    global_batch_size: int = setting(
        256, "Rows in one optimizer step, over all ranks.", rule=AT_LEAST_1, source="DGA"
    )
    per_device_train_batch_size: int | None = setting(
        None,
        "Rows of one micro-batch of one rank. Default: the global batch over ranks and accumulation.",
        rule=AT_LEAST_1,
        affects="speed",
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "Micro-batches of a rank in one step. Default: what the two batch sizes give, 1 without the second.",
        rule=AT_LEAST_1,
        affects="speed",
    )
    learning_rate: float = setting(1e-4, "Peak learning rate.", rule=ABOVE_0, source="DGA's released code")
    lr_scheduler_type: str = setting(
        "linear",
        "Decay after warm-up: linear or cosine to min_lr_ratio, constant, or warmup_stable_decay "
        "(constant, then 1 - sqrt over the last decay_ratio).",
        DECAYS,
    )
    warmup_ratio: float = setting(
        0.1, "Share of the steps in which the learning rate rises.", rule=SHARE, source="DGA"
    )
    decay_ratio: float = setting(0.2, "Share of the steps in which warmup_stable_decay decays.", rule=SHARE)
    min_lr_ratio: float = setting(0.0, "Learning rate at the end over the peak.", rule=SHARE)
    optimizer: str = setting("adamw", "Optimizer: a name in the table of dga_scale/zero/optimizers.py.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.", rule=AT_LEAST_0, source="DGA's released code")
    adam_beta1: float = setting(0.9, "AdamW's beta1.", rule=BELOW_1)
    adam_beta2: float = setting(0.999, "AdamW's beta2.", rule=BELOW_1)
    adam_epsilon: float = setting(1e-6, "AdamW's epsilon.", rule=ABOVE_0, source="DGA's released code")
    layer_lr_decay: float = setting(
        1.0,
        "Learning rate of a layer over that of the layer above it; the LM head has the full rate. 1: off.",
        rule=ABOVE_0_TO_1,
        source="ELECTRA",
    )
    freeze_layers: int = setting(0, "Lowest layers that are not trained.", rule=AT_LEAST_0)
    freeze_embeddings: bool = setting(False, "Do not train the embeddings (nor an LM head tied to them).")
    max_grad_norm: float = setting(
        1.0, "Gradient norm above which gradients are scaled down; 0: off.", rule=AT_LEAST_0
    )
    bf16: bool = setting(
        True, "Weights are bfloat16 in forward passes, float32 in the optimizer. False: all float32."
    )
    fp16: bool = setting(False, "Weights are float16, with loss scaling, not bf16 (ZeRO 1 to 3, on a GPU).")
    max_bad_steps: int = setting(
        10,
        "Steps in a row refused for a NaN or infinity after which the run stops.",
        rule=AT_LEAST_1,
        affects="place",
    )


@dataclass(frozen=True)
class RunSettings:
    """The run's folder, its log and its saves."""

    ds_config: str | None = setting(
        None,
        "DeepSpeed's JSON, for example ds_configs/zero2.json. Needed.",
        affects="speed",
        refers="file",
    )
    output_dir: str | None = setting(None, "The run's folder. Default: runs/METHOD-CORPUS.", affects="place")
    resume: str = setting(
        "auto",
        "What a run starts from. auto: the newest complete checkpoint of output_dir, if there is one; "
        "never: the model, and a folder with a checkpoint is refused; or the path of a checkpoint, of "
        "another run for a new folder, which then uses its companions.",
        affects="place",
    )
    seed: int = setting(42, "Seed of the order, the masks and dropout.", rule=SEED, repeats=True)
    deterministic: bool = setting(
        False,
        "Use deterministic algorithms only, so that runs on the same GPUs are equal bit for bit: slower "
        "there, and an operation that has none is refused. On CPUs runs are equal without it.",
        affects="speed",
    )
    logging_steps: int = setting(
        1, "Steps between log lines and the points of curves.", rule=AT_LEAST_1, affects="place"
    )
    loggers: list[str] | None = setting(
        None,
        "Where a run's figures go beside log.jsonl and the terminal: names of the table in "
        "dga_scale/logging/loggers.py, or none. Default: tensorboard.",
        affects="place",
    )
    protection_steps: int = setting(
        50,
        "Steps between records of effective protection (protected units' movement beside the target 1 - a) "
        "and of cse's experts (their shares of the sequences, and how far their centres went).",
        rule=AT_LEAST_1,
        affects="place",
    )
    eval_steps: int = setting(
        500,
        "Steps between evaluations; also before the first and after the last step.",
        rule=AT_LEAST_1,
        affects="place",
    )
    save_steps: int = setting(
        500, "Steps between checkpoints; also after the last step.", rule=AT_LEAST_1, affects="place"
    )
    save_total_limit: int = setting(
        2, "Checkpoints kept; older ones are removed. 0: all.", rule=AT_LEAST_0, affects="place"
    )
    async_save: bool = setting(
        False,
        "Write checkpoints while training goes on: a save copies the rank's shard into host memory (12 bytes "
        "an entry that its optimizer steps) and is committed a few steps later.",
        affects="place",
    )
    check_invariants: int = setting(
        0,
        "Steps between checks that all ranks hold the same weights, masks, gates and experts' centres and "
        "have used the rows that were planned; also before the first step. A violation stops the run. "
        "0: off.",
        rule=AT_LEAST_0,
        affects="place",
    )
    heartbeat_timeout: float = setting(
        120.0,
        "Seconds without a heartbeat from a rank after which the others take it for lost and end, naming it. "
        "A process that ends is noticed at once. 0: no watchdog.",
        rule=AT_LEAST_0,
        affects="place",
    )
    dry_run: bool = setting(
        False,
        "Build everything, run one step of the real shapes, print what it needs, and stop.",
        affects="place",
    )


GROUPS = ("model", "data", "method", "optimization", "run")
"""The settings of a run, by their names in ``TrainConfig``."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run.

    Attributes:
        method: The method's own settings, of a subclass of ``MethodSettings``, which names the method.
        explicit: The names that came from a flag or the YAML file.

    """

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    optimization: OptimizationSettings
    run: RunSettings
    explicit: frozenset[str] = frozenset()

    @property
    def method_name(self) -> str:
        """The method's name, as ``--method`` takes it."""
        return self.method.name

    def settings(self) -> Iterator[Setting]:
        """Return the declarations of all settings of this run but ``--method``."""
        for group in GROUPS:
            yield from declared(type(getattr(self, group)))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as one flat dictionary, as in the YAML file."""
        flat: dict[str, Any] = {}
        for name in GROUPS:
            if name == "method":
                flat["method"] = self.method_name
            values = dataclasses.asdict(getattr(self, name))
            flat |= {flag_name(field): value for field, value in values.items()}
        return flat

    def replace(self, **values: Any) -> "TrainConfig":
        """Return a copy with settings changed by their flat names."""
        groups: dict[str, Any] = {}
        for group_name in GROUPS:
            group = getattr(self, group_name)
            names = {flag_name(f.name): f.name for f in fields(group)}
            own = {field: values.pop(name) for name, field in names.items() if name in values}
            groups[group_name] = dataclasses.replace(group, **own)
        assert not values, f"unknown settings {sorted(values)}"
        return dataclasses.replace(self, **groups)
