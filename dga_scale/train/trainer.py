"""The trainer: a run's model and its DeepSpeed engine on one rank, built and stepped."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from dga_scale.backbone.flops import model_flops
from dga_scale.backbone.layers import learning_rate_scales
from dga_scale.backbone.packed_rows import can_pack
from dga_scale.checkpoint.companions import record_companions
from dga_scale.checkpoint.state import Save, load_checkpoint
from dga_scale.config.methods.shared import ProtectionSettings, soft_mask_of
from dga_scale.corpus.loading.batches import Batch, Counts
from dga_scale.corpus.loading.streams import BatchStream, StepBatches
from dga_scale.launch.world import Cluster
from dga_scale.logging.run_log import RunLog
from dga_scale.objectives.grad_cache import CachedContrast, cache_contrast
from dga_scale.objectives.methods import build_method
from dga_scale.objectives.training_model import TrainingModel
from dga_scale.preservation.protection import Protection
from dga_scale.storage.safetensors_stream import FileRecord
from dga_scale.train.initial_model import starting_model
from dga_scale.train.inputs import Inputs
from dga_scale.train.resume import Start
from dga_scale.train.schedule import Schedule
from dga_scale.train.seeds import seed_everything
from dga_scale.train.weight_regularisation import build_weight_penalty
from dga_scale.zero.engine import build_engine, set_learning_rate
from dga_scale.zero.optimizer_hooks import EngineWeights, backward, leave_idle, local_fragments
from dga_scale.zero.optimizers import optimizer_kind


class Trainer:
    """The model that a run trains, as one rank holds it, and the step that trains it.

    Built in the order that DeepSpeed asks for: the model, a head where it has none, hooks on the gradients,
    the engine; then what reads the engine's shards, which hold the pretrained weights until a checkpoint is
    loaded into them.

    Args:
        inputs: The inputs of the run.
        cluster: The ranks.
        log: The log of the run.
        start: The run's start, with a checkpoint whose state is loaded; None: the model's weights.
        check_stop: A function that is called between the batches of what is measured before and after the
            steps, on every rank at the same point; it raises what ends the work.

    Attributes:
        method: The objective.
        model: The training model; ``engine.module`` is the same.
        anatomy: The places of the language model's units.
        flops: The FLOPs of the language model's passes.
        protection: The protection of those units, for methods that have some.
        engine: The DeepSpeed engine.
        start: The run's start, and the schedule of its learning rate.
        before: The base model's evaluation, which checkpoints keep; empty as long as there is none.

    Raises:
        UserError: On every rank, for a model, method or checkpoint that can't be used.

    """

    def __init__(
        self,
        inputs: Inputs,
        cluster: Cluster,
        log: RunLog,
        start: Start | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.inputs, self.cluster, self.log, self.check_stop = inputs, cluster, log, check_stop
        self.config = config = inputs.config
        self.method = build_method(config)
        self.start = start or Start(None, Schedule.of(config.optimization), config.optimization.optimizer)
        self.before = self.start.before
        self._companions: dict[str, FileRecord] | None = None
        initial = starting_model(inputs, cluster, log, self.method, self.start, check_stop)
        self.anatomy, self._published_config = initial.anatomy, initial.config
        self.flops = model_flops(initial.lm, initial.anatomy)
        self._pack = can_pack(initial.lm, initial.anatomy)
        settings = config.method
        self.protection = Protection(
            initial.lm,
            anatomy=initial.anatomy,
            kinds=self.method.kinds,
            soft_mask=soft_mask_of(settings),
            kv_protection=settings.kv_protection if isinstance(settings, ProtectionSettings) else "min",
            reduce=cluster.sum,
        )
        self.model = TrainingModel(
            initial.lm,
            initial.anatomy,
            self.method,
            protection=self.protection,
            teacher=initial.teacher,
            split_views=config.model.split_views,
        )
        self.model.train()  # from_pretrained leaves dropout off
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        scales = learning_rate_scales(initial.lm, self.anatomy, config.optimization.layer_lr_decay)
        self.engine = build_engine(self.model, inputs.resolved, scales)
        moments = optimizer_kind(config.optimization.optimizer).moments
        leave_idle(self.engine, self.method.idle_parameters, moments)
        if self.protection.soft_mask != "none":
            self.protection.attach(EngineWeights(self.engine))
        plan = self.method.weight_regularisation()
        self._weight_penalty = (
            build_weight_penalty(self.engine, plan, inputs, cluster, log, self.start, check_stop)
            if plan
            else None
        )
        for line in self.start.lines:
            log.print(line)
        if self.start.checkpoint is not None:
            load_checkpoint(self.engine, self.start.checkpoint, cluster)

    @property
    def resuming(self) -> bool:
        """Whether the run resumes from a checkpoint."""
        return self.start.checkpoint is not None

    def stream(self, completed_steps: int) -> BatchStream:
        """Return the batches of the steps that are left."""
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
            The loss terms (scalars on the device; the mean over ranks is the value on the global batch),
            and the learning rate.

        """
        resolved = self.inputs.resolved
        learning_rate = self.start.schedule.learning_rate(batches.step)
        set_learning_rate(self.engine, learning_rate)
        seed_everything(self.config.run.seed, 0, batches.step, self.cluster.rank)
        sums: dict[str, Tensor] = {}
        for inputs, cached in self._micro_batches(batches.micro_batches):
            loss, terms = self.engine(inputs, batches.counts, cached=cached)
            backward(self.engine, loss)
            self.engine.step()
            named = self._by_corpus(terms, batches.counts)
            for name, value in {"total": loss.detach(), **named}.items():
                sums[name] = sums.get(name, 0.0) + value / resolved.accumulation_steps
        return sums, learning_rate

    def penalty(self) -> dict[str, float]:
        """Return the penalty on the weights as they are, which no loss contains; empty without one."""
        if self._weight_penalty is None:
            return {}
        return {
            "loss/weight_regularisation": self._weight_penalty.penalty(
                local_fragments(self.engine), self.cluster.sum
            )
        }

    def checkpoint(self, step: int) -> Save:
        """Describe the checkpoint after ``step`` steps, to be written; every rank has to call it."""
        return Save(
            self.engine,
            self.inputs.tokenizer,
            self.inputs.folder.path,
            self.start.state(step, self.inputs.content_hash, self.before),
            self.cluster,
            self.config.run.save_total_limit,
            self._published_config,
            self._recorded_companions(),
        )

    def _recorded_companions(self) -> dict[str, FileRecord]:
        """Return the companions of the checkpoints, hashed once: they don't change while the run trains."""
        if self._companions is None:
            folder = self.inputs.folder
            self._companions = record_companions(folder) if self.cluster.rank == 0 else {}
        return self._companions

    def _micro_batches(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, CachedContrast | None]]:
        """Yield each micro-batch on the device, and its part of a contrast over all of them, if any."""
        model: TrainingModel = self.engine.module
        on_device = (batch.to(self.cluster.device) for batch in batches)
        if model.contrast is None or not model.contrast.spans(len(batches)):
            yield from ((inputs, None) for inputs in on_device)
        else:
            together = list(on_device)
            # Through the module's call, which gathers ZeRO-3's parameters, but past the engine's.
            cached = cache_contrast(
                model.contrast, together, lambda inputs: model(inputs, compute=model.contrasted)
            )
            yield from zip(together, cached, strict=True)

    def _by_corpus(self, terms: dict[str, Tensor], counts: Counts) -> dict[str, Tensor]:
        """Return the terms, with a mixture's sources called by their names.

        A source that has no label in the whole step has no loss: its term, of 0, is left out.
        """
        names = {f"mlm/{k}": f"mlm/{name}" for k, name in enumerate(self.inputs.source_names)}
        absent = {f"mlm/{k}" for k, labels in enumerate(counts.labels_per_source) if not labels}
        return {names.get(name, name): value for name, value in terms.items() if name not in absent}
