"""The model that a run starts from: loaded, given a head where it has none, changed as its method asks."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy, anatomy_of
from dga_scale.backbone.cpu_kernels import use_cpu_kernels
from dga_scale.backbone.extended import ExtendedConfig
from dga_scale.backbone.layers import freeze
from dga_scale.backbone.loading import LoadedModel, load_model, load_model_config
from dga_scale.backbone.packed_rows import can_pack
from dga_scale.backbone.warmup import head_is_of, load_head, save_head, warm_up_head
from dga_scale.corpus.loading.batches import Batch, mixed_batch
from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.streams import BatchStream
from dga_scale.corpus.shards import check_sequence_length
from dga_scale.launch.world import Cluster
from dga_scale.logging.run_log import RunLog
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.train.inputs import Inputs
from dga_scale.train.resume import Start
from dga_scale.train.seeds import INITIAL_STREAM, PREPARE_STREAM, WARMUP_STREAM, seed_everything
from dga_scale.zero.engine import partitioned_loading


@dataclass(frozen=True)
class StartingModel:
    """A model ready for the engine.

    Attributes:
        lm: The model that is trained.
        anatomy: The model's anatomy.
        config: The configuration that is saved with its weights.
        teacher: A frozen copy of the model before its method changed it, for methods that need one.

    """

    lm: PreTrainedModel
    anatomy: Anatomy
    config: PretrainedConfig
    teacher: PreTrainedModel | None


def starting_model(
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    method: Method[Any],
    start: Start,
    check_stop: Callable[[], None] = lambda: None,
) -> StartingModel:
    """Load the model with its starting weights, the same whether a run begins or resumes.

    Raises:
        UserError: On every rank, for a model that can't be loaded or that the method can't work with.
    """
    resuming = start.checkpoint is not None
    loaded = _load(inputs, cluster, method, resuming)
    _check_sequence_lengths(inputs, loaded.anatomy)
    if loaded.missing_head:
        _give_head(loaded, inputs, cluster, log, start, check_stop)
    teacher = None
    if method.needs_teacher:
        partitioned = any(hasattr(p, "ds_id") for p in loaded.model.parameters())
        # A copy would be of the partitions only.
        teacher = _load(inputs, cluster, method, True).model if partitioned else copy.deepcopy(loaded.model)
    optimization = inputs.config.optimization
    freeze(loaded.model, loaded.anatomy, optimization.freeze_layers, optimization.freeze_embeddings)
    seed_everything(inputs.config.run.seed, PREPARE_STREAM, 0, 0)  # new parameters are equal on all ranks
    changed = method.prepare(_context(loaded, inputs, cluster, log, resuming))
    if cluster.device.type == "cpu":
        use_cpu_kernels(changed or loaded.model)  # in what the method has added too
    if changed is None:
        return StartingModel(loaded.model, loaded.anatomy, loaded.config, teacher)
    anatomy = anatomy_of(changed)
    _check_sequence_lengths(inputs, anatomy)  # soft tokens take some positions
    return StartingModel(changed, anatomy, _published(changed.config, loaded.config), teacher)


def _check_sequence_lengths(inputs: Inputs, anatomy: Anatomy) -> None:
    for corpus in inputs.corpora():
        check_sequence_length(corpus, anatomy.max_positions)


def _published(changed: PretrainedConfig, before: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that is saved with a model: of the base, what was published."""
    config = copy.deepcopy(changed)
    config.base = before.base if isinstance(before, ExtendedConfig) else before
    return config


def _load(inputs: Inputs, cluster: Cluster, method: Method[Any], resuming: bool) -> LoadedModel:
    settings = inputs.config.model
    # Head warm-up, and methods that say so, run the model on its own: it has to be whole on each rank. So
    # has one with an extension, which is built before its weights are there.
    whole = settings.head_warmup_steps > 0 or method.needs_whole_model
    whole = whole or load_model_config(settings.model or "").extended
    # For weights that are drawn: equal on all ranks.
    seed_everything(inputs.config.run.seed, INITIAL_STREAM, 0, 0)
    with contextlib.nullcontext() if whole else partitioned_loading(inputs.resolved):
        loaded = cluster.run_on_all(
            lambda: load_model(
                settings.model or "",
                dropout=settings.dropout,
                attn_implementation=settings.attn_implementation,
                allow_new_head=settings.head_warmup_steps > 0 or resuming,
                random_init=settings.random_init,
            )
        )
    if cluster.device.type == "cpu":
        use_cpu_kernels(loaded.model)
    return loaded


def _context(
    loaded: LoadedModel, inputs: Inputs, cluster: Cluster, log: RunLog, resuming: bool
) -> MethodContext:
    def sample(rows: int) -> Iterator[Batch]:
        size = inputs.resolved.micro_batch_size
        pass_rows = size * cluster.world_size
        for start in range(0, max(1, rows // pass_rows) * pass_rows, pass_rows):
            first = start + cluster.rank * size
            picks = inputs.mixture.picks(first, first + size)
            yield mixed_batch(inputs.mixture, picks, inputs.masking).to(cluster.device)

    return MethodContext(
        lm=loaded.model,
        anatomy=loaded.anatomy,
        config=inputs.config,
        folder=inputs.folder.path,
        resuming=resuming,
        device=cluster.device,
        sample=sample,
        sum=cluster.sum,
        all_gather_object=cluster.all_gather_object,
        run_on_first=cluster.run_on_first,
        print=log.print,
    )


def _give_head(
    loaded: LoadedModel,
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    start: Start,
    check_stop: Callable[[], None],
) -> None:
    """Warm up an LM head for a checkpoint without one, on the run's corpus, before anything is measured.

    One that the run has warmed up before, whether or not it has a checkpoint by now, is loaded.
    """
    path = inputs.folder.head
    if start.checkpoint is not None or cluster.run_on_first(lambda: head_is_of(path, start.base_model)):
        cluster.run_on_all(lambda: load_head(loaded.model, loaded.anatomy, path))
        return
    settings, resolved = inputs.config.model, inputs.resolved
    steps = settings.head_warmup_steps
    log.print(f"{settings.model} has no LM head: training one for {steps} steps")

    def on_step(step: int, loss: Tensor) -> None:
        check_stop()
        if (step + 1) % max(1, steps // 10) == 0:
            log.print(f"head warm-up {step + 1}/{steps}: loss {loss:.4f}")

    stream = BatchStream(
        Mixture([inputs.corpus], [], inputs.config.run.seed + WARMUP_STREAM),
        inputs.masking,
        global_batch_size=resolved.micro_batch_size * cluster.world_size,
        micro_batch_size=resolved.micro_batch_size,
        rank=cluster.rank,
        world_size=cluster.world_size,
        start_step=0,
        num_steps=steps,
        pack=can_pack(loaded.model, loaded.anatomy),
    )
    lm: torch.nn.Module = loaded.model
    lm.to(cluster.device)
    with stream:
        warm_up_head(
            loaded.model,
            loaded.anatomy,
            (step.micro_batches[0].to(cluster.device) for step in stream),
            steps=steps,
            learning_rate=settings.head_warmup_learning_rate,
            reduce=cluster.sum,
            autocast=None if resolved.precision == "fp32" else torch.bfloat16,
            on_step=on_step,
        )
    cluster.run_on_first(lambda: save_head(loaded.model, loaded.anatomy, path, start.base_model))
