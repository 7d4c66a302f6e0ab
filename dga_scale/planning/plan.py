"""Plan a run: a rank's memory, traffic and time, whether the run fits, and the best settings that fit."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dga_scale.config.methods.shared import soft_mask_of
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.planning.activations import Batch
from dga_scale.planning.cost import Time, Traffic, forward_backward_flops, time, traffic
from dga_scale.planning.gpus import Gpu
from dga_scale.planning.memory import Memory, Zero, memory
from dga_scale.planning.models import PlannedModel, build_model
from dga_scale.zero.ds_config import ResolvedConfig, resolve_ds_config

GIB = 2**30
ALIKE = 1.05
"""The ratio to the shortest step up to which steps count as equally long."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan: the number of GPUs in total and in one machine, and their figures."""

    gpus: int
    per_node: int
    gpu: Gpu

    @property
    def room(self) -> float:
        """The bytes of a GPU that a run can use."""
        return (self.gpu.memory_gib - self.gpu.reserved_gib) * GIB

    @property
    def host_room(self) -> float:
        """The bytes of the host's memory for each GPU."""
        return self.gpu.host_memory_gib * GIB


@dataclass(frozen=True)
class Choice:
    """The settings that can be chosen freely for a run: they change memory and speed, not the result.

    The micro-batch of a contrast is an exception, unless it spans the global batch: its negatives are the
    rows of one micro-batch on all ranks.
    """

    stage: int
    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True)
class Plan:
    """The memory, traffic and time of one choice of settings."""

    choice: Choice
    accumulation: int
    zero: Zero
    batch: Batch
    memory: Memory
    traffic: Traffic
    time: Time
    mfu: float
    fits: bool
    """Whether the run fits on the GPU and, with offload, in the host's memory."""


@dataclass(frozen=True)
class Planner:
    """Computes plans for one model, cluster and set of settings.

    Attributes:
        model: The model of the run.
        config: The settings of the run.
        raw: DeepSpeed's JSON as read.
        cluster: The machines.
        length: The number of tokens a row.
    """

    model: PlannedModel
    config: TrainConfig
    raw: Mapping[str, Any]
    cluster: Cluster
    length: int

    def resolved(self, gpus: int | None = None, **settings: Any) -> ResolvedConfig:
        """Resolve DeepSpeed's configuration for a number of GPUs, with some settings changed by name."""
        config, raw = self.config, dict(self.raw)
        stage = settings.pop("stage", None)
        if stage is not None:
            raw["zero_optimization"] = _with_stage(raw.get("zero_optimization") or {}, stage)
        if settings:
            for key in _BATCH_KEYS:
                raw[key] = "auto"
            config = dataclasses.replace(config.replace(**settings), explicit=config.explicit | set(settings))
        return resolve_ds_config(
            raw,
            config,
            world_size=gpus or self.cluster.gpus,
            hidden_size=self.model.anatomy.hidden_size,
            device=torch.device("meta"),
        )

    def as_configured(self) -> Plan:
        """Plan the settings as they are.

        Raises:
            UserError: The settings contradict each other, or the batch does not divide.
        """
        resolved = self.resolved()
        choice = Choice(
            resolved.zero_stage, resolved.micro_batch_size, self.config.model.gradient_checkpointing
        )
        return self.plan(resolved, choice.checkpointing, self.cluster.gpus)

    def plan(self, resolved: ResolvedConfig, checkpointing: bool, gpus: int) -> Plan:
        """Compute memory, traffic and time of a resolved configuration."""
        model, cluster = self.model, self.cluster
        zero = Zero.of(resolved, gpus)
        views = len(model.method.views())
        batch = Batch(
            rows=resolved.micro_batch_size,
            length=self.length,
            labels=self.length - 1 if model.anatomy.causal
            else max(1, round(self.config.data.mlm_probability * self.length)),
            views=views,
            stacked=1 if self.config.model.split_views else views,
        )  # fmt: skip
        need = memory(
            model,
            zero,
            batch,
            checkpointing=checkpointing,
            micro_steps=resolved.accumulation_steps,
            soft_mask=soft_mask_of(self.config.method),
            groups=self.config.optimization.weight_decay > 0,
            async_save=self.config.run.async_save,
        )
        micro_steps = resolved.accumulation_steps
        seconds = time(
            model,
            zero,
            batch,
            cluster.gpu,
            micro_steps=micro_steps,
            ranks_per_node=cluster.per_node,
            checkpointing=checkpointing,
        )
        flops = forward_backward_flops(
            model, batch, micro_steps=micro_steps, ranks=gpus, checkpointing=checkpointing
        )
        peak = cluster.gpu.fp32_tflops if zero.weight_bytes == 4 else cluster.gpu.bf16_tflops
        return Plan(
            choice=Choice(zero.stage, batch.rows, checkpointing),
            accumulation=micro_steps,
            zero=zero,
            batch=batch,
            memory=need,
            traffic=traffic(model, zero, batch, micro_steps=micro_steps),
            time=seconds,
            mfu=flops.model / (seconds.step * gpus * peak * 1e12),
            fits=need.total <= cluster.room and need.host_total <= cluster.host_room,
        )

    def of(self, choice: Choice, total: int, gpus: int) -> Plan:
        """Plan a choice, for a global batch of ``total`` rows on a number of GPUs."""
        resolved = self.resolved(
            gpus,
            stage=choice.stage,
            global_batch_size=total,
            per_device_train_batch_size=choice.micro_batch,
            gradient_accumulation_steps=total // (gpus * choice.micro_batch),
        )
        return self.plan(resolved, choice.checkpointing, gpus)

    def recommended(self) -> Plan | None:
        """Recommend the largest micro-batch that fits, under the fastest stage that it fits.

        Activations are recomputed where that is faster, as it can be where a larger micro-batch means fewer
        micro-batches. Stages within 5% of the fastest count as equal, because the host's cost of a higher
        stage's hooks is not modelled: the configured one is chosen, else the lowest. Offload stays as in the
        JSON.

        Returns:
            The plan; None where nothing fits, not even one row under ZeRO-3.
        """
        settings = sorted({self.config.model.gradient_checkpointing, self.model.checkpoints})
        found = [plan for plan in map(self._largest, settings) if plan is not None]
        return min(found, key=lambda plan: plan.time.step, default=None)

    def _largest(self, checkpointing: bool) -> Plan | None:
        resolved, gpus = self.resolved(), self.cluster.gpus
        total, stages = resolved.global_batch_size, self._stages()
        for micro in _divisors(total // gpus):
            plans = [self.of(Choice(stage, micro, checkpointing), total, gpus) for stage in stages]
            fitting = [plan for plan in plans if plan.fits]
            if fitting:
                limit = ALIKE * min(plan.time.step for plan in fitting)
                alike = [plan for plan in fitting if plan.time.step <= limit]
                return min(alike, key=lambda p: (p.choice.stage != resolved.zero_stage, p.choice.stage))
        return None

    def _stages(self) -> Sequence[int]:
        """Return the stages that can run with the JSON's offload and the precision."""
        resolved = self.resolved()
        if resolved.offload_parameters:
            return (3,)
        return (1, 2, 3) if resolved.offload_optimizer or resolved.precision == "fp16" else (0, 1, 2, 3)

    def smallest(self) -> Plan:
        """Plan the run with the least memory: one row, ZeRO-3, everything recomputed."""
        return self.of(
            Choice(3, 1, self.model.checkpoints), self.resolved().global_batch_size, self.cluster.gpus
        )

    def scaling(self) -> Iterator[tuple[int, list[Plan]]]:
        """Plan weak scaling: the configured rows a rank on 1, 2, 4, ... 1,024 GPUs, under each stage."""
        resolved = self.resolved()
        rows, micro_steps = resolved.micro_batch_size, resolved.accumulation_steps
        checkpointing = self.config.model.gradient_checkpointing
        for gpus in (2**power for power in range(11)):
            plans = [
                self.of(Choice(stage, rows, checkpointing), rows * micro_steps * gpus, gpus)
                for stage in self._stages()
            ]
            yield gpus, plans


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SIZED_BY_MODEL = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def _with_stage(zero: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """Return the section for another stage: as in ``ds_configs/``, with the given offload."""
    if zero.get("stage", 0) == stage:
        return dict(zero)
    kept = {key: value for key, value in zero.items() if key == "offload_optimizer"}
    if stage in (1, 2):
        kept |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    elif stage == 3:
        kept |= dict.fromkeys(_SIZED_BY_MODEL, "auto")
    return kept | {"stage": stage, "overlap_comm": stage >= 2}


def _divisors(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [candidate for candidate in range(number, 0, -1) if number % candidate == 0]


def make_planner(
    config: TrainConfig, raw: Mapping[str, Any], cluster: Cluster, length: int | None
) -> Planner:
    """Build the model and check the length of rows against its positions.

    Raises:
        UserError: As ``build_model``; or the rows are longer than the model takes.
    """
    model = build_model(config)
    longest = model.anatomy.max_positions
    if length is None:
        length = min(512, longest)
    if not 2 <= length <= longest:
        raise UserError(
            f"--sequence_length {length}: {model.name} takes 2 to {longest} tokens. Choose one of those"
        )
    return Planner(model, config, raw, cluster, length)
