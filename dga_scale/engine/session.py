"""The model, its DeepSpeed engine and its masks on one rank: built, protected, stepped, evaluated."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dga_scale.backbone.loading import LoadedModel, load_model
from dga_scale.backbone.warmup import warm_up_head
from dga_scale.corpus.batches import Batch, BatchStream, EvalBatches, StepBatches
from dga_scale.corpus.mixture import Mixture
from dga_scale.corpus.shards import check_sequence_length
from dga_scale.engine.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from dga_scale.engine.checkpoint_folder import Checkpoint
from dga_scale.engine.cluster import Cluster
from dga_scale.engine.deepspeed import build_engine, partitioned_loading, set_learning_rate
from dga_scale.engine.inputs import Inputs
from dga_scale.engine.optimizer_step import backward, local_fragments, wrap_optimizer_step
from dga_scale.engine.schedule import learning_rate_at
from dga_scale.errors import UserError
from dga_scale.monitoring.metrics import RunLog
from dga_scale.objectives import build_method
from dga_scale.objectives.training_model import TrainingModel, evaluate_sums
from dga_scale.objectives.views import ModelInputs
from dga_scale.preservation.importance import Importance, measure_importance
from dga_scale.preservation.movement import EffectiveProtection, MovementTracker
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors

WARMUP_STREAM, IMPORTANCE_STREAM = 1, 2
"""Beside the training steps (0), what else draws random numbers from the run's seed."""

ADAM_UNDOES_GRADIENT_MASKS = (
    "soft_mask gradient (the papers' formula): AdamW divides each gradient by its own running size, so it "
    "largely undoes a constant factor on it; effective protection is logged. --soft_mask update masks the "
    "step that AdamW makes instead."
)


class Session:
    """What a rank holds during a run.

    Built in the order that DeepSpeed asks for: the model, a head where it has none, hooks on the gradients,
    the engine; then what reads the engine's shards, which hold the pretrained weights until a checkpoint is
    loaded into them.
    """

    def __init__(
        self, inputs: Inputs, cluster: Cluster, log: RunLog, resume_from: Checkpoint | None = None
    ) -> None:
        self.inputs, self.cluster, self.log = inputs, cluster, log
        self.config = config = inputs.config
        loaded = self._loaded(resume_from is not None)
        self.anatomy, self._published_config = loaded.anatomy, loaded.config
        check_sequence_length(inputs.corpus.manifest, self.anatomy.max_positions)
        method = build_method(config.method)
        self.needs_importance = method.needs_importance
        self.model = TrainingModel(loaded.model, self.anatomy, method, split_views=config.method.split_views)
        if loaded.missing_head and resume_from is None:
            self._warm_up_head()
        self.model.train()  # from_pretrained leaves dropout off
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        soft_mask = config.method.soft_mask if method.needs_importance else "none"
        self._gradient_mask: GradientMask | None = None
        self._update_mask: UpdateMask | None = None
        self._movement: MovementTracker | None = None
        if soft_mask == "gradient":
            self._gradient_mask = GradientMask(loaded.model.named_parameters(), self.anatomy)
        self.engine = build_engine(self.model, inputs.resolved)
        if soft_mask != "none":
            self._movement = MovementTracker(self.anatomy, local_fragments(self.engine))
        self.protection: dict[str, Tensor] = {}
        if resume_from is not None:
            self._load(resume_from)

    def _loaded(self, resuming: bool) -> LoadedModel:
        settings = self.config.model
        warming_up = settings.head_warmup_steps > 0 and not resuming  # needs the whole model on each rank
        spread = contextlib.nullcontext() if warming_up else partitioned_loading(self.inputs.resolved)
        with spread:
            return self.cluster.run_on_all(
                lambda: load_model(
                    settings.model or "",
                    dropout=settings.dropout,
                    attn_implementation=settings.attn_implementation,
                    allow_new_head=warming_up or resuming,
                )
            )

    def protect(self) -> None:
        """Measure importance, or read it where this run has measured it before, and set the masks."""
        if not self.needs_importance:
            return
        importance = self.cluster.run_on_all(self._known_importance)
        if importance is None:
            importance = self._measured_importance()
        protection = importance.protection(self.config.method.importance_squash)
        self.log.importance(importance.values, protection)
        if self._gradient_mask:
            self.log.print(ADAM_UNDOES_GRADIENT_MASKS)
        self.set_protection(protection)

    def set_protection(self, protection: dict[str, Tensor]) -> None:
        """Gate the contrast's general view and mask gradient or update with ``a`` (layers, units) by kind."""
        settings = self.config.method
        self.protection = protection
        self.model.set_protection(protection)
        factors = mask_factors(self.anatomy, protection, settings.kv_protection)
        if self._gradient_mask:
            self._gradient_mask.set(factors)
        elif settings.soft_mask == "update":
            mask = self._update_mask = UpdateMask(self.anatomy, factors)
            wrap_optimizer_step(self.engine, mask.before_step, mask.after_step)

    def stream(self, completed_steps: int) -> BatchStream:
        """The batches of the steps that are left."""
        inputs, optimization = self.inputs, self.config.optimization
        return BatchStream(
            inputs.mixture,
            inputs.masking,
            global_batch_size=inputs.resolved.global_batch_size,
            micro_batch_size=inputs.resolved.micro_batch_size,
            rank=self.cluster.rank,
            world_size=self.cluster.world_size,
            start_step=completed_steps,
            num_steps=optimization.max_steps - completed_steps,
            prefetch=self.config.data.prefetch_steps,
        )

    def train_step(self, batches: StepBatches) -> tuple[dict[str, Tensor], float]:
        """One optimizer step on this rank's part of the global batch.

        Returns:
            the loss terms (scalars on the device; the mean over ranks is the value on the global batch),
            and the learning rate.
        """
        resolved = self.inputs.resolved
        learning_rate = learning_rate_at(batches.step, self.config.optimization)
        set_learning_rate(self.engine, learning_rate)
        seed_everything(self.config.run.seed, 0, batches.step, self.cluster.rank)
        scale = self.cluster.world_size * resolved.accumulation_steps / sum(batches.global_masked)
        sums: dict[str, Tensor] = {}
        for batch in batches.micro_batches:
            loss, terms = self.engine(*to_device(batch, self.cluster.device), mlm_scale=scale)
            backward(self.engine, loss)
            self.engine.step()
            for name, value in {"total": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / resolved.accumulation_steps
        return sums, learning_rate

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on each held-out corpus: the same rows and masks whenever it is called."""
        figures = {}
        for name, corpus in self.inputs.evaluations.items():
            batches = EvalBatches(
                corpus,
                self.inputs.masking,
                batch_size=self.inputs.resolved.micro_batch_size,
                rank=self.cluster.rank,
                world_size=self.cluster.world_size,
                max_rows=self.config.data.max_eval_samples,
            )
            sums = torch.zeros(3, dtype=torch.float64, device=self.cluster.device)
            for batch in batches:
                sums += evaluate_sums(self.engine.module, to_device(batch, self.cluster.device))
            loss, count, correct = self.cluster.sum(sums).tolist()
            figures[f"{name}_loss"], figures[f"{name}_accuracy"] = loss / count, correct / count
        return figures

    def effective_protection(self) -> EffectiveProtection | None:
        """How far each head has moved against what its mask promised; None for a run without masks."""
        if self._movement is None:
            return None
        moved = self._movement.effective_protection(
            local_fragments(self.engine), self.protection, self.cluster.sum
        )
        return moved["heads"]

    def applied_over_wanted(self) -> Tensor | None:
        """``update`` mode: each head's steps over those the optimizer wanted, since last asked."""
        if self._update_mask is None:
            return None
        return self._update_mask.applied_over_wanted(self.cluster.sum)["heads"]

    def save(self, step: int) -> Path:
        """Commit a checkpoint after ``step`` steps; every rank has to call it."""
        return save_checkpoint(
            self.engine,
            self.inputs.tokenizer,
            self.inputs.folder.path,
            TrainerState(step=step, corpus_hash=self.inputs.corpus.content_hash),
            self.cluster,
            self.config.run.save_total_limit,
            self._published_config,
        )

    def _load(self, resume_from: Checkpoint) -> None:
        state = load_checkpoint(self.engine, resume_from, self.cluster)
        if state.corpus_hash != self.inputs.corpus.content_hash:
            raise UserError(
                f"{resume_from.path} was trained on another corpus than {self.inputs.corpus.path} is now. "
                "Restore the corpus, or start anew in another --output_dir."
            )
        for line in resume_from.passed_over:
            self.log.print(line)
        self.log.print(f"going on from {resume_from.path}")

    def _warm_up_head(self) -> None:
        """Give a checkpoint without an LM head one, on the run's corpus, before anything is measured."""
        settings, resolved = self.config.model, self.inputs.resolved
        self.log.print(
            f"{settings.model} has no LM head: training one for {settings.head_warmup_steps} steps"
        )
        stream = BatchStream(
            Mixture([self.inputs.corpus], [], self.config.run.seed + WARMUP_STREAM),
            self.inputs.masking,
            global_batch_size=resolved.micro_batch_size * self.cluster.world_size,
            micro_batch_size=resolved.micro_batch_size,
            rank=self.cluster.rank,
            world_size=self.cluster.world_size,
            start_step=0,
            num_steps=settings.head_warmup_steps,
        )
        self.model.to(self.cluster.device)
        with stream:
            warm_up_head(
                self.model.lm,
                self.anatomy,
                (to_device(step.micro_batches[0], self.cluster.device) for step in stream),
                steps=settings.head_warmup_steps,
                learning_rate=settings.head_warmup_learning_rate,
                reduce=self.cluster.sum,
                autocast=None if resolved.precision == "fp32" else torch.bfloat16,
                on_step=self._log_warm_up,
            )

    def _log_warm_up(self, step: int, loss: Tensor) -> None:
        total = self.config.model.head_warmup_steps
        if (step + 1) % max(1, total // 10) == 0:
            self.log.print(f"head warm-up {step + 1}/{total}: loss {loss:.4f}")

    def _known_importance(self) -> Importance | None:
        path = self.inputs.folder.importance
        return Importance.load(path) if path.exists() else None

    def _measured_importance(self) -> Importance:
        settings = self.config.method
        batches = EvalBatches(
            self.inputs.corpus,
            self.inputs.masking,
            batch_size=self.inputs.resolved.micro_batch_size,
            rank=self.cluster.rank,
            world_size=self.cluster.world_size,
            max_rows=settings.importance_samples,
        )
        rows = min(settings.importance_samples, len(self.inputs.corpus))
        heads = f"{self.anatomy.num_layers} x {self.anatomy.num_heads} heads"
        self.log.print(f"measuring the importance of {heads} on {rows} rows")
        seed_everything(self.config.run.seed, IMPORTANCE_STREAM, 0, self.cluster.rank)
        importance = measure_importance(
            self.engine.module,
            self._on_device(batches, "importance"),
            distribution=settings.importance_distribution,
            reduce=self.cluster.sum,
            settings={
                "model": self.config.model.model,
                "corpus": self.inputs.corpus.content_hash,
                "seed": self.config.run.seed,
            },
        )
        self.cluster.run_on_first(lambda: importance.save(self.inputs.folder.importance))
        return importance

    def _on_device(self, batches: EvalBatches, name: str) -> Iterator[ModelInputs]:
        for batch in self.log.track(batches, len(batches), name):
            yield to_device(batch, self.cluster.device)


def to_device(batch: Batch, device: torch.device) -> ModelInputs:
    """The tensors of a batch that the model reads, on its device; on CUDA copied without waiting."""
    tensors = [batch.input_ids, batch.masked_ids, batch.attention_mask, batch.positions, batch.labels]
    if device.type == "cuda":
        tensors = [t.pin_memory() for t in tensors]
    return ModelInputs(*(t.to(device, non_blocking=True) for t in tensors))


def seed_everything(seed: int, stream: int, step: int, rank: int) -> None:
    """Seed dropout of one step on one rank, so that a resumed run needs no saved random state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, stream, step, rank)).generate_state(1, np.uint64)[0]))
