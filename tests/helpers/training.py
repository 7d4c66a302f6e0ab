"""A tiny masked LM under DeepSpeed, for the tests of this folder: model and batches alike on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from dga_scale.checkpoint.state import Save, TrainerState
from dga_scale.config.methods.mlm import MLMSettings
from dga_scale.config.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    TrainConfig,
)
from dga_scale.launch.world import join_cluster
from dga_scale.zero.ds_config import ResolvedConfig, resolve_ds_config
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward
from dga_scale.zero.shards import local_shards

VOCABULARY = 120
LENGTH = 12
LEARNING_RATE = 1e-3
FP16_HERE: bool = torch.ops.mkldnn._is_mkldnn_fp16_supported()
"""Whether this CPU computes in fp16."""
FP16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}


def tiny_bert(seed: int = 0, dropout: float = 0.0, layers: int = 2) -> BertForMaskedLM:
    """2 layers, 32 wide, 4 heads: no parameter size is a multiple of what ZeRO pads to."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=52,
        max_position_embeddings=33,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config).train()


class MaskedLM(nn.Module):
    """What the loop trains, reduced to the masked-LM loss: ``lm`` inside, a scaled sum of losses outside."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, labels: Tensor, scale: float) -> Tensor:
        logits = self.lm(input_ids=input_ids).logits
        return (
            nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            * scale
        )


@dataclass(frozen=True)
class Setup:
    """One way to run: what varies between the cells of the tests."""

    stage: int = 2
    precision: str = "fp32"
    offload: bool = False
    accumulation: int = 1
    clipping: float = 1.0
    weight_decay: float = 0.0
    epsilon: float = 1e-6
    rows: int = 8
    sub_group_size: int | None = None
    persistence: int = 0
    offload_parameters: bool = False

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", self.precision, f"accumulation {self.accumulation}"]
        parts += ["offload"] * self.offload + [f"clipping {self.clipping:g}"] * (self.clipping > 0)
        return ", ".join(parts)

    def resolved(self, world_size: int) -> ResolvedConfig:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero |= {"stage3_param_persistence_threshold": self.persistence}
            if self.sub_group_size:
                zero |= {"sub_group_size": self.sub_group_size}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        zero["reduce_bucket_size"] = "auto"
        optimization = OptimizationSettings(
            global_batch_size=self.rows,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=LEARNING_RATE,
            weight_decay=self.weight_decay,
            adam_epsilon=self.epsilon,
            max_grad_norm=self.clipping,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
        )
        config = TrainConfig(
            ModelSettings(),
            DataSettings(),
            MLMSettings(),
            optimization,
            RunSettings(ds_config="test.json"),
            frozenset({"global_batch_size", "gradient_accumulation_steps"}),
        )
        return resolve_ds_config(
            {"zero_optimization": zero} | ({"fp16": FP16} if self.precision == "fp16" else {}),
            config,
            world_size=world_size,
            hidden_size=32,
            device=torch.device("cpu"),
        )


def tiny_engine(setup: Setup, model: nn.Module | None = None) -> DeepSpeedEngine:
    world_size = torch.distributed.get_world_size()
    engine = build_engine(model or MaskedLM(tiny_bert()), setup.resolved(world_size))
    set_learning_rate(engine, LEARNING_RATE)
    return engine


def global_batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Token ids and labels (rows, length) of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = torch.where(torch.rand(rows, LENGTH, generator=generator) < 0.3, ids, -100)
    return ids, labels


def train_step(
    engine: DeepSpeedEngine,
    step: int,
    poison: str = "",
    batch_of: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch,
) -> float:
    """One optimizer step on this rank's share; the loss of the global batch, exact on every rank.

    ``poison``: "loss" or "gradient" makes that infinite or NaN in the last pass of the last rank.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    micro_batches = engine.gradient_accumulation_steps()
    ids, labels = batch_of(step, engine.train_batch_size())
    masked = int((labels != -100).sum())
    total = torch.zeros(())
    for index in range(micro_batches):
        micro = engine.train_micro_batch_size_per_gpu()
        start = (index * world_size + rank) * micro
        rows = slice(start, start + micro)
        loss = engine(ids[rows], labels[rows], world_size * micro_batches / masked)
        total += loss.detach() / (world_size * micro_batches)
        if poison and index == micro_batches - 1 and rank == world_size - 1:
            loss = loss * float("nan") if poison == "gradient" else loss + float("inf")
        backward(engine, loss)
        engine.step()
    torch.distributed.all_reduce(total)
    return total.item()


def full_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The fp32 weights the optimizer steps, put together from all ranks' fragments, on every rank."""
    return _gather(engine, lambda shard, offset, fragment: fragment.values)


def full_state(engine: DeepSpeedEngine, key: str) -> dict[str, Tensor]:
    """A moment of AdamW ("exp_avg", "exp_avg_sq"), put together in the same way."""
    states = engine.basic_optimizer.state

    def moment(shard: Any, offset: int, fragment: Any) -> Tensor:
        return states[shard.stepped][key].view(-1)[offset : offset + fragment.values.numel()]

    return _gather(engine, moment)


def _gather(engine: DeepSpeedEngine, values_of: Any) -> dict[str, Tensor]:
    local = [
        (fragment.name, fragment.start, fragment.shape, values_of(shard, offset, fragment).detach().clone())
        for shard in local_shards(engine)
        for offset, fragment in zip(shard.offsets, shard.fragments, strict=True)
    ]
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, local)
    full: dict[str, Tensor] = {}
    for name, start, shape, values in (piece for pieces in everyones for piece in pieces):
        own = full.setdefault(name, torch.full(shape, float("nan"))).view(-1)[start : start + len(values)]
        assert own.isnan().all() or torch.equal(own, values), f"ranks differ in {name}"  # ZeRO-0 has copies
        own.copy_(values)
    assert all(not tensor.isnan().any() for tensor in full.values()), "an entry belongs to no rank"
    return full


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word of its own for each id of ``tiny_bert``."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words |= {f"word{i}": i for i in range(len(words), VOCABULARY + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def describe_save(engine: DeepSpeedEngine, folder: Path, step: int, limit: int = 0) -> Save:
    """A save of the run in ``folder``, still to be written; every rank has to call it."""
    state = TrainerState(step, "corpus")
    return Save(engine, tiny_tokenizer(), folder, state, join_cluster(), limit)


def save(engine: DeepSpeedEngine, folder: Path, step: int, limit: int = 0) -> Path:
    """Write and commit a checkpoint; every rank has to call it."""
    described = describe_save(engine, folder, step, limit)
    described.write()
    return described.commit()
