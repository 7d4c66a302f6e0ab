"""DeepSpeed's JSON and the settings, brought together: ``"auto"`` resolved, contradictions refused.

The rules are those that users of transformers' Trainer know. ``"auto"``, or a key left out, takes the
setting's value. A number in the JSON wins over a setting's default, and is refused where it contradicts a
flag (or a line of the YAML file) that the user gave.
"""

import copy
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch

from dga_scale.config.declaration import shown
from dga_scale.config.methods import known_settings
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.zero.optimizers import optimizer_kind

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULE_FLAGS = {
    "total_num_steps": "--max_steps",
    "warmup_num_steps": "--warmup_ratio",
    "warmup_max_lr": "--learning_rate",
    "cos_min_ratio": "--min_lr_ratio",
}


@dataclass(frozen=True)
class ResolvedConfig:
    """The resolved configuration of a run: DeepSpeed's without any ``"auto"``, and the figures behind it.

    Attributes:
        ds_config: The configuration that ``deepspeed.initialize`` gets.
        config: The settings, with what the JSON decided filled in (batch sizes, learning rate, ...).
        zero_stage: The ZeRO stage, 0 to 3.
        precision: "fp32", "bf16" or "fp16".
        offload_optimizer, offload_parameters: Whether they live in CPU memory.
        micro_batch_size: The number of rows of one micro-batch of one rank.
        accumulation_steps: The number of micro-batches of one rank in one optimizer step.
        global_batch_size: The number of rows in one optimizer step over all ranks: the product of the two and
            the ranks.

    """

    ds_config: dict[str, Any]
    config: TrainConfig
    zero_stage: int
    precision: str
    offload_optimizer: bool
    offload_parameters: bool
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int


def resolve_ds_config(
    raw: dict[str, Any], config: TrainConfig, *, world_size: int, hidden_size: int, device: torch.device
) -> ResolvedConfig:
    """Resolve a JSON that ``load_ds_config`` has read.

    Raises:
        UserError: The JSON contradicts a flag or itself, batch sizes do not divide, or the device or the
            ZeRO stage can't do what is asked for.

    """
    resolver = _Resolver(copy.deepcopy(raw), config)
    stage = resolver.zero(hidden_size)
    precision = resolver.precision(stage, device)
    micro, accumulation, total = resolver.batch(world_size)
    resolver.optimizer()
    resolver.schedule()
    clipping = resolver.agree("gradient_clipping", "max_grad_norm")
    ds = resolver.ds
    ds["gradient_clipping"] = float(clipping)
    zero = ds["zero_optimization"]
    offload = {
        kind: (zero.get(f"offload_{kind}") or {}).get("device", "none") != "none"
        for kind in ("optimizer", "param")
    }
    if precision != "fp32":
        # Many small gradients summed in 16 bits, over ranks or micro-batches, lose what is below 1/256 of the
        # sum. "communication_data_type": "bf16" in the JSON halves the traffic where the network is the
        # limit.
        ds.setdefault("communication_data_type", "fp32")
        if stage > 0 and accumulation > 1:
            ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # DeepSpeed's own throughput timer, which nothing here reads, waits for the GPU twice in each micro-step.
    ds.setdefault("timers", {"throughput": {"enabled": False}})
    # DeepSpeed knows some optimizers by their class; ours are those of the table, whatever it knows.
    ds["zero_allow_untested_optimizer"] = True
    if offload["optimizer"]:
        # torch's fused AdamW runs on the CPU too, without a compiler on the machine.
        ds["zero_force_ds_cpu_optimizer"] = False
    resolver.refuse_auto(ds, "")
    return ResolvedConfig(
        ds_config=ds,
        config=config.replace(**resolver.decided),
        zero_stage=stage,
        precision=precision,
        offload_optimizer=offload["optimizer"],
        offload_parameters=offload["param"],
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        global_batch_size=total,
    )


class _Resolver:
    """The JSON on its way to being resolved, and what it decided for the settings."""

    def __init__(self, ds: dict[str, Any], config: TrainConfig) -> None:
        self.ds = ds
        self.path = config.run.ds_config
        self.flags = config.as_dict()
        self.explicit = config.explicit
        self.decided: dict[str, Any] = {}
        self.settings = known_settings()

    def refuse(self, key: str, what: str, do: str) -> NoReturn:
        raise UserError(f"{self.path}: {key}: {what}. {do[:1].upper()}{do[1:]}.")

    def get(self, dotted: str) -> Any:
        """Look up a value; None where it is left out or ``"auto"``."""
        section: Any = self.ds
        for key in dotted.split("."):
            section = (section or {}).get(key)
        return None if section == "auto" else section

    def number(self, dotted: str, whole: bool = False) -> Any:
        value = self.get(dotted)
        kinds = (int,) if whole else (int, float)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            self.refuse(dotted, f"{value!r} is no {'whole ' * whole}number", 'write a number or "auto"')
        return value

    def agree(self, dotted: str, flag: str) -> Any:
        """Decide between the JSON's number and the flag's."""
        return self.decide(dotted, self.number(dotted), flag)

    def decide(self, dotted: str, value: Any, flag: str) -> Any:
        """Decide between the JSON's value and the flag's, by the rule of the setting."""
        setting, declared = self.flags[flag], self.settings[flag]
        if words := declared.problem(value):
            self.refuse(dotted, f"{shown(value)} must be {words}", 'write that, or "auto"')
        if value is None or value == setting:
            return setting
        if flag in self.explicit:
            raise UserError(
                f"{self.path}: {dotted} is {value}, but --{flag} is {setting}: which one is meant? "
                f'Write "auto" in the JSON, or leave --{flag} out.'
            )
        self.decided[flag] = value
        return value

    def zero(self, hidden_size: int) -> int:
        zero = self.ds.setdefault("zero_optimization", {})
        if zero.get("stage") == "auto":
            self.refuse("zero_optimization.stage", '"auto" has no meaning there', "choose 0, 1, 2 or 3")
        stage = self.number("zero_optimization.stage", whole=True)
        zero["stage"] = stage = 0 if stage is None else stage
        if stage not in (0, 1, 2, 3):
            self.refuse("zero_optimization.stage", f"there is no stage {stage}", "choose 0, 1, 2 or 3")
        for kind, stages in {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}.items():
            device = (zero.get(kind) or {}).get("device", "none")
            if device == "none":
                continue
            where = f"zero_optimization.{kind}.device"
            if device != "cpu":
                what = f"{device!r} is not supported: the masks and the checkpoints need the shards in memory"
                self.refuse(where, what, 'write "cpu"')
            if stage not in stages:
                self.refuse(
                    where, f"ZeRO-{stage} has nothing to offload there", f"use stage {stages[0]} or more"
                )
        sizes = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        for key, value in sizes.items():
            if zero.get(key) == "auto":
                zero[key] = value
        return cast(int, stage)

    def precision(self, stage: int, device: torch.device) -> str:
        """Decide on "fp32", "bf16" or "fp16", and write both of DeepSpeed's switches."""
        # --fp16 alone means fp16 instead of the default bf16.
        implied = {"bf16": False} if "fp16" in self.explicit and self.flags["fp16"] else {}
        if self.get("fp16.enabled") and "bf16" not in self.explicit:
            implied = {"bf16": False}
        if self.get("bf16.enabled") is None and "bf16" not in self.explicit and implied:
            self.decided |= implied
            self.flags |= implied
        enabled = {
            kind: self.decide(f"{kind}.enabled", self.get(f"{kind}.enabled"), kind)
            for kind in ("bf16", "fp16")
        }
        if enabled["bf16"] and enabled["fp16"]:
            self.refuse("bf16, fp16", "both are enabled", "choose one of --bf16 true and --fp16 true")
        for kind, on in enabled.items():
            self.ds.setdefault(kind, {})["enabled"] = on
        if enabled["fp16"]:
            if stage == 0:
                what = "DeepSpeed 0.19 divides the update by the loss scale in this combination"
                self.refuse("fp16 with ZeRO-0", what, "use bf16, or ZeRO 1 to 3")
            if not _supports_fp16(device):
                self.refuse("fp16", f"the device ({device.type}) can't compute in it", "use --bf16 true")
            return "fp16"
        if enabled["bf16"]:
            self.ds["bf16"]["check_grad_overflow"] = True
            if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
                self.refuse("bf16", "this GPU can't compute in it", "use --fp16 true or --bf16 false")
            return "bf16"
        return "fp32"

    def batch(self, world_size: int) -> tuple[int, int, int]:
        """Decide on the micro-batch size, accumulation steps and global batch size, each from the others."""
        names = {
            "micro": ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
            "accumulation": ("gradient_accumulation_steps", "gradient_accumulation_steps"),
            "total": ("train_batch_size", "global_batch_size"),
        }
        given: dict[str, int | None] = {}
        for name, (key, flag) in names.items():
            value = self.number(key, whole=True)
            said = value is not None or flag in self.explicit
            given[name] = self.decide(key, value, flag) if said else None
        micro, accumulation, total = given["micro"], given["accumulation"], given["total"]
        if total is None:
            total = self.flags["global_batch_size"]
            if micro and accumulation:
                total = micro * accumulation * world_size
        if micro is None:
            accumulation = accumulation or 1
            micro = self._share(total, accumulation, world_size, f"{accumulation} micro-batches")
        elif accumulation is None:
            accumulation = self._share(total, micro, world_size, f"micro-batches of {micro} rows")
        if micro * accumulation * world_size != total:
            raise UserError(
                f"the batch sizes contradict each other: {micro} rows a micro-batch x {accumulation} "
                f"gradient accumulation steps x {world_size} ranks = {micro * accumulation * world_size}, "
                f"not {total}. Leave out one "
                f"of --per_device_train_batch_size, --gradient_accumulation_steps and --global_batch_size "
                f'(in {self.path}: write "auto").'
            )
        for name, value in {"micro": micro, "accumulation": accumulation, "total": total}.items():
            key, flag = names[name]
            self.ds[key] = self.decided[flag] = value
        return micro, accumulation, total

    def _share(self, total: int, unit: int, world_size: int, into: str) -> int:
        """Divide ``total`` by ``unit`` on each rank."""
        by = unit * world_size
        if total % by:
            below = total - total % by
            choice = f"{below} or {below + by}" if below else f"{by}"
            fitting = [n for n in range(1, min(total, 2 * world_size) + 1) if total % (unit * n) == 0]
            fewer, more = [n for n in fitting if n < world_size], [n for n in fitting if n > world_size]
            ranks = " or ".join(map(str, fewer[-1:] + more[:1]))
            raise UserError(
                f"a global batch of {total} rows does not divide into {into} on each of {world_size} ranks. "
                f"Set --global_batch_size to {choice}, or change the other batch settings (of flags and of "
                f"{self.path})" + (f"; or, to resume a run, start {ranks} ranks." if ranks else ".")
            )
        return total // by

    def optimizer(self) -> None:
        """Take AdamW's numbers out of the JSON; the program builds the optimizer from the settings."""
        optimizer_kind(self.flags["optimizer"])
        section = self.ds.pop("optimizer", None)
        if section is None:
            return
        if self.flags["optimizer"] != "adamw":
            what = f"its numbers are AdamW's, --optimizer is {self.flags['optimizer']}"
            self.refuse("optimizer", what, "leave the section out")
        self.ds["optimizer"] = section  # for the look-ups
        kind = self.get("optimizer.type") or "AdamW"
        if str(kind).lower() not in ("adam", "adamw") or self.get("optimizer.params.adam_w_mode") is False:
            what = f"{kind} is not supported: the masks are defined and tested with AdamW"
            self.refuse("optimizer.type", what, 'write "AdamW" or leave the section out')
        self.agree("optimizer.params.lr", "learning_rate")
        self.agree("optimizer.params.eps", "adam_epsilon")
        self.agree("optimizer.params.weight_decay", "weight_decay")
        betas = self.get("optimizer.params.betas")
        if betas is not None:
            if not (isinstance(betas, list) and len(betas) == 2):
                self.refuse(
                    "optimizer.params.betas", f"{betas!r} is no pair of numbers", "write [0.9, 0.999]"
                )
            for value, flag in zip(betas, ("adam_beta1", "adam_beta2"), strict=True):
                self.decide("optimizer.params.betas", value, flag)
        del self.ds["optimizer"]

    def schedule(self) -> None:
        """Take the schedule's kind out of the JSON; its numbers come from the flags."""
        section = self.ds.get("scheduler")
        if section is None:
            return
        kind = section.get("type", "auto")
        if kind != "auto":
            if kind not in _SCHEDULES:
                self.refuse("scheduler.type", f"{kind} is not supported", "use --lr_scheduler_type")
            self.decide(f"scheduler.type ({kind})", _SCHEDULES[kind], "lr_scheduler_type")
        for name, value in (self.get("scheduler.params") or {}).items():
            # 0 is what Trainer fills in for warmup_min_lr, and what the schedule starts from.
            if value != "auto" and (name, value) != ("warmup_min_lr", 0):
                flag = _SCHEDULE_FLAGS.get(name, "--lr_scheduler_type and its settings")
                self.refuse(
                    f"scheduler.params.{name}", f"{value} is fixed here", f'write "auto" and use {flag}'
                )
        del self.ds["scheduler"]

    def refuse_auto(self, section: dict[str, Any], where: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                self.refuse_auto(value, f"{where}{key}.")
            elif value == "auto" and key != "keep_in_fp32_modules":
                self.refuse(
                    f"{where}{key}", '"auto" has no meaning there', "write a value or leave the key out"
                )


def _supports_fp16(device: torch.device) -> bool:
    from deepspeed.accelerator import get_accelerator

    # "meta" stands for the GPUs of a plan, or of a job that is to be submitted.
    return device.type in ("cuda", "meta") or bool(get_accelerator().is_fp16_supported())
