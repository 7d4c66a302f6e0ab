"""The model, its DeepSpeed engine and its masks on one rank: built, protected, stepped."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dga_scale.backbone.layers import learning_rate_scales
from dga_scale.backbone.packed_rows import can_pack
from dga_scale.checkpoint.state import Save, TrainerState, load_checkpoint
from dga_scale.checkpoint.store import Checkpoint
from dga_scale.config.methods.das import DASSettings
from dga_scale.config.methods.shared import ProtectionSettings, soft_mask_of
from dga_scale.corpus.loading.batches import Batch, BatchStream, EvalBatches, StepBatches
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.logging.metrics import RunLog
from dga_scale.objectives.grad_cache import CachedContrast, cache_contrast
from dga_scale.objectives.methods import build_method
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.preservation.importance import Importance, combined_protection, measure_importance
from dga_scale.preservation.movement import EffectiveProtection, MovementTracker
from dga_scale.preservation.soft_mask import GradientMask, UpdateMask, mask_factors
from dga_scale.train.anchor import build_anchor
from dga_scale.train.initial_model import starting_model
from dga_scale.train.inputs import Inputs
from dga_scale.train.schedule import learning_rate_at
from dga_scale.train.seeds import IMPORTANCE_STREAM, seed_everything
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import backward, local_fragments, wrap_optimizer_step

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
        self.method = build_method(config)
        start = starting_model(inputs, cluster, log, self.method, resuming=resume_from is not None)
        self.anatomy, self._published_config = start.anatomy, start.config
        self.model = TrainingModel(
            start.lm, start.anatomy, self.method, teacher=start.teacher, split_views=config.model.split_views
        )
        self.model.train()  # from_pretrained leaves dropout off
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self._pack = can_pack(start.lm, start.anatomy)
        kinds = self.method.kinds
        self._soft_mask = soft_mask_of(config.method)
        self._gradient_mask: GradientMask | None = None
        self._update_mask: UpdateMask | None = None
        self._movement: MovementTracker | None = None
        if self._soft_mask == "gradient":
            self._gradient_mask = GradientMask(start.lm.named_parameters(), self.anatomy, kinds)
        scales = learning_rate_scales(start.lm, self.anatomy, config.optimization.layer_lr_decay)
        self.engine = build_engine(self.model, inputs.resolved, scales)
        if self._soft_mask != "none":
            self._movement = MovementTracker(self.anatomy, local_fragments(self.engine), kinds)
        plan = self.method.anchor()
        self._anchor = build_anchor(self.engine, plan, inputs, cluster, log) if plan else None
        self.protection: dict[str, Tensor] = {}
        self._resumes_folder = resume_from is not None and resume_from.lies_in(inputs.folder.path)
        if resume_from is not None:
            self._load(resume_from)

    def protect(self) -> None:
        """Measure importance, or read it where this run has measured it before, and set the masks."""
        if not self.method.kinds:
            return
        settings = self._protection_settings()
        squash = settings.importance_squash
        prior = settings.prior_importance if isinstance(settings, DASSettings) else None
        if prior:
            earlier = self.cluster.run_on_all(lambda: [Importance.load(path) for path in prior])
            importance, protection = combined_protection(earlier, self.anatomy, squash)
        else:
            path = self.inputs.folder.importance
            known = self.cluster.run_on_all(lambda: _known_importance(path, self._resumes_folder))
            importance = known or self._measured_importance("proxy_kl", path)
            protection = importance.protection(squash)
        self.log.importance(importance.values, protection)
        if self._gradient_mask:
            self.log.print(ADAM_UNDOES_GRADIENT_MASKS)
        self.set_protection(protection)

    def _protection_settings(self) -> ProtectionSettings:
        settings = self.config.method
        assert isinstance(settings, ProtectionSettings), f"{self.method.name} has kinds and no such settings"
        return settings

    def finish(self) -> None:
        """What a method does after its last step: measure what the domain needs, where it says so."""
        path = self.inputs.folder.importance_after
        if self.method.measures_after and not self.cluster.run_on_first(path.exists):
            self._measured_importance("mlm", path)

    def set_protection(self, protection: dict[str, Tensor]) -> None:
        """Gate the contrast's general view and mask gradient or update with ``a`` (layers, units) by kind."""
        self.protection = protection
        self.model.set_protection(protection)
        factors = mask_factors(self.anatomy, protection, self._protection_settings().kv_protection)
        if self._gradient_mask:
            self._gradient_mask.set(factors)
        elif self._soft_mask == "update":
            mask = self._update_mask = UpdateMask(self.anatomy, factors, self.method.kinds)
            wrap_optimizer_step(self.engine, mask.before_step, mask.after_step)

    def shared_tensors(self) -> dict[str, Tensor]:
        """Protection, gates and soft-mask factors, by names for messages: the same on all ranks."""
        found = {f"protection of {kind}": a for kind, a in self.protection.items()}
        found |= {f"gates of {kind}": a for kind, a in self.model.protection.items()}
        mask = self._gradient_mask or self._update_mask
        for name, factors in (mask.factors if mask else {}).items():
            found |= {f"soft-mask of {name} along axis {f.dim}": f.scale for f in factors}
        return found

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
            pack=self._pack,
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
        sums: dict[str, Tensor] = {}
        for inputs, cached in self._passes(batches.micro_batches):
            loss, terms = self.engine(inputs, batches.counts, cached=cached)
            backward(self.engine, loss)
            self.engine.step()
            for name, value in {"total": loss.detach(), **self._by_corpus(terms)}.items():
                sums[name] = sums.get(name, 0.0) + value / resolved.accumulation_steps
        return sums, learning_rate

    def _passes(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, CachedContrast | None]]:
        """Each micro-batch on the device, and its part of a contrast over all of them where there is one."""
        model: TrainingModel = self.engine.module
        moved = (batch.to(self.cluster.device) for batch in batches)
        if model.contrast is None or not model.contrast.spans(len(batches)):
            yield from ((inputs, None) for inputs in moved)
        else:
            together = list(moved)
            # Through the module's call, which gathers ZeRO-3's parameters, but past the engine's.
            cached = cache_contrast(
                model.contrast, together, lambda inputs: model(inputs, compute=model.contrasted)
            )
            yield from zip(together, cached, strict=True)

    def _by_corpus(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms, with a mixture's sources called by their names."""
        names = {f"mlm/{k}": f"mlm/{name}" for k, name in enumerate(self.inputs.source_names)}
        return {names.get(name, name): value for name, value in terms.items()}

    def effective_protection(self) -> dict[str, EffectiveProtection]:
        """By kind, how far each unit has moved against what its mask asks for; empty without masks."""
        if self._movement is None:
            return {}
        return self._movement.effective_protection(
            local_fragments(self.engine), self.protection, self.cluster.sum
        )

    def applied_over_proposed(self) -> dict[str, Tensor]:
        """By kind, in ``update`` mode, each unit's steps over those proposed by the optimizer."""
        if self._update_mask is None:
            return {}
        return self._update_mask.applied_over_proposed(self.cluster.sum)

    def penalty(self) -> dict[str, float]:
        """The anchor's penalty on the weights as they are, which no loss contains; empty without one."""
        if self._anchor is None:
            return {}
        return {"loss/anchor": self._anchor.penalty(local_fragments(self.engine), self.cluster.sum)}

    def checkpoint(self, step: int) -> Save:
        """Describe the checkpoint after ``step`` steps, to be written; every rank has to call it."""
        return Save(
            self.engine,
            self.inputs.tokenizer,
            self.inputs.folder.path,
            TrainerState(step=step, corpus_hash=self.inputs.content_hash),
            self.cluster,
            self.config.run.save_total_limit,
            self._published_config,
        )

    def _load(self, resume_from: Checkpoint) -> None:
        state = load_checkpoint(self.engine, resume_from, self.cluster)
        if state.corpus_hash != self.inputs.content_hash:
            raise UserError(
                f"{resume_from.path} was trained on another corpus than {self.inputs.corpus.path} is now. "
                "Restore the corpus, or start anew in another --output_dir."
            )
        for line in resume_from.skipped:
            self.log.print(line)
        self.log.print(f"going on from {resume_from.path}")

    def _measured_importance(self, loss: str, path: Path) -> Importance:
        """Importance for general knowledge ("proxy_kl") or the domain ("mlm"), kept in the run's folder."""
        settings = self._protection_settings()
        batches = EvalBatches(
            self.inputs.corpus,
            self.inputs.masking,
            batch_size=self.inputs.resolved.micro_batch_size,
            rank=self.cluster.rank,
            world_size=self.cluster.world_size,
            max_rows=settings.importance_samples,
        )
        rows = min(settings.importance_samples, len(self.inputs.corpus))
        shapes = {kind: self.anatomy.unit_shape(kind) for kind in self.method.kinds}
        units = [f"{layers} x {size} {kind}" for kind, (layers, size) in shapes.items()]
        self.log.print(f"measuring the importance of {', '.join(units)} on {rows} rows")
        # Proxy KL compares two dropout draws; the LM loss is measured without.
        self.engine.module.train(loss == "proxy_kl")
        seed_everything(self.config.run.seed, IMPORTANCE_STREAM, 0, self.cluster.rank)
        importance = measure_importance(
            self.engine.module,
            self._on_device(batches, "importance"),
            kinds=self.method.kinds,
            loss=loss,
            distribution=settings.importance_distribution,
            reduce=self.cluster.sum,
            settings={
                "model": self.config.model.model,
                "corpus": self.inputs.corpus.content_hash,
                "seed": self.config.run.seed,
            },
        )
        self.engine.module.train()
        self.cluster.run_on_first(lambda: importance.save(path))
        return importance

    def _on_device(self, batches: EvalBatches, name: str) -> Iterator[Batch]:
        for batch in self.log.track(batches, len(batches), name):
            yield batch.to(self.cluster.device)


def _known_importance(path: Path, needed: bool) -> Importance | None:
    if needed and not path.exists():
        raise UserError(
            f"{path} is missing: the importance that this run protects was measured on the model that it "
            "started from. Restore it, or start anew in another --output_dir"
        )
    return Importance.load(path) if path.exists() else None
