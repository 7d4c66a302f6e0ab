"""The trainer: a run's model and its DeepSpeed engine on one rank, built and stepped."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from dga_scale.backbone.layers import learning_rate_scales
from dga_scale.backbone.packed_rows import can_pack
from dga_scale.checkpoint.state import Save, TrainerState, load_checkpoint
from dga_scale.checkpoint.store import Checkpoint
from dga_scale.config.methods.shared import ProtectionSettings, soft_mask_of
from dga_scale.corpus.loading.batches import Batch, BatchStream, StepBatches
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.logging.metrics import RunLog
from dga_scale.objectives.grad_cache import CachedContrast, cache_contrast
from dga_scale.objectives.methods import build_method
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.preservation.protection import Protection
from dga_scale.train.anchor import build_anchor
from dga_scale.train.initial_model import starting_model
from dga_scale.train.inputs import Inputs
from dga_scale.train.schedule import learning_rate_at
from dga_scale.train.seeds import seed_everything
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import EngineWeights, backward, local_fragments


class Trainer:
    """What a rank holds of the model that a run trains, and the step that trains it.

    Built in the order that DeepSpeed asks for: the model, a head where it has none, hooks on the gradients,
    the engine; then what reads the engine's shards, which hold the pretrained weights until a checkpoint is
    loaded into them.

    Args:
        inputs: what the run works on.
        cluster: the ranks.
        log: of the run.
        resume_from: a checkpoint whose state is loaded; None: training starts from the model's weights.

    Attributes:
        method: the objective.
        model: the training model; ``engine.module`` is the same.
        anatomy: where the units of the language model live.
        protection: the protection of those units, for methods that have some.
        engine: the DeepSpeed engine.
        resumes_own_folder: whether the checkpoint is one of this run's folder.

    Raises:
        UserError: on every rank, for a model, method or checkpoint that can't be used.

    """

    def __init__(
        self, inputs: Inputs, cluster: Cluster, log: RunLog, resume_from: Checkpoint | None = None
    ) -> None:
        self.inputs, self.cluster, self.log = inputs, cluster, log
        self.config = config = inputs.config
        self.method = build_method(config)
        start = starting_model(inputs, cluster, log, self.method, resuming=resume_from is not None)
        self.anatomy, self._published_config = start.anatomy, start.config
        self._pack = can_pack(start.lm, start.anatomy)
        settings = config.method
        self.protection = Protection(
            start.lm,
            anatomy=start.anatomy,
            kinds=self.method.kinds,
            soft_mask=soft_mask_of(settings),
            kv_protection=settings.kv_protection if isinstance(settings, ProtectionSettings) else "min",
            reduce=cluster.sum,
        )
        self.model = TrainingModel(
            start.lm,
            start.anatomy,
            self.method,
            protection=self.protection,
            teacher=start.teacher,
            split_views=config.model.split_views,
        )
        self.model.train()  # from_pretrained leaves dropout off
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        scales = learning_rate_scales(start.lm, self.anatomy, config.optimization.layer_lr_decay)
        self.engine = build_engine(self.model, inputs.resolved, scales)
        if self.protection.soft_mask != "none":
            self.protection.attach(EngineWeights(self.engine))
        plan = self.method.anchor()
        self._anchor = build_anchor(self.engine, plan, inputs, cluster, log) if plan else None
        self.resumes_own_folder = resume_from is not None and resume_from.lies_in(inputs.folder.path)
        if resume_from is not None:
            self._load(resume_from)

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

    def step(self, batches: StepBatches) -> tuple[dict[str, Tensor], float]:
        """Make one optimizer step on this rank's part of the global batch.

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

    def _load(self, resume_from: Checkpoint) -> None:
        state = load_checkpoint(self.engine, resume_from, self.cluster)
        if state.corpus_hash != self.inputs.content_hash:
            raise UserError(
                f"{resume_from.path} was trained on another corpus than {self.inputs.corpus.path} is now. "
                "Restore the corpus, or start anew in another --output_dir."
            )
        for line in resume_from.skipped:
            self.log.print(line)
        self.log.print(f"resuming from {resume_from.path}")
