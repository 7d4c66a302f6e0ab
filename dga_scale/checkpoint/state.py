"""Checkpoints of weights, moments and counters that load on any number of ranks and in any ZeRO stage.

``RUN/checkpoints/step-000500`` holds, besides its manifest (see ``checkpoint_folder``):

- ``rank-00000.safetensors``, ...: of each parameter the fp32 entries that this rank's optimizer steps, with
  their moments, and their positions in the full parameter. No pickle, and nothing depends on how many ranks
  there were: a run resumed with others reads the ranges it needs, and nothing has to be converted.
- ``model/``: configuration and tokenizer, for the export.
- ``trainer_state.json``: plain data.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dga_scale.backbone.peft.lora import save_lora_config
from dga_scale.checkpoint.store import (
    Checkpoint,
    checkpoint_path,
    commit,
    newest_complete,
    prune,
)
from dga_scale.config.declaration import shown
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.logging.records import check_evaluation
from dga_scale.run_folder import write_text
from dga_scale.storage.atomic import sync
from dga_scale.storage.safetensors_stream import (
    Entry,
    FileRecord,
    SegmentReader,
    record_of,
    write_safetensors,
)
from dga_scale.storage.typed_json import read_typed
from dga_scale.zero.engine import Engine
from dga_scale.zero.optimizers import optimizer_kind
from dga_scale.zero.shards import equal_share, frozen_shares, local_shards, refresh_model_weights

_STEP = re.compile(r"[0-9]{1,15}\.0")
STATE, MODEL = "trainer_state.json", "model"
T = TypeVar("T")


LossScale = Literal["cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"]


@dataclass(frozen=True)
class TrainerState:
    """The state of a run besides weights and moments. Plain data.

    Attributes:
        step: The number of optimizer steps done, refused ones included, from which data and schedule resume.
        corpus_hash: The content hash of the training corpus; resuming on another one is refused.
        refused_steps: The number of refused steps among them.
        loss_scale: The state of fp16's dynamic loss scale; empty otherwise.
        base_model: The hash of the weights that training started from; resuming with others is refused.
        prior_importance: The hashes of the files of ``--prior_importance``, in their order.
        schedule: The learning rate schedule by which these steps were done.
        before: The evaluation of the base model: its figures and its text.
        optimizer: The name of the optimizer whose moments the checkpoint holds (``--optimizer``).

    """

    step: int
    corpus_hash: str = ""
    refused_steps: int = 0
    loss_scale: dict[LossScale, float] = field(default_factory=dict)
    base_model: str = ""
    prior_importance: list[str] = field(default_factory=list)
    schedule: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"


class Save:
    """A save of a checkpoint: described by the constructor, written by ``write``, committed by ``commit``.

    The constructor and ``commit`` communicate, so every rank's main thread does both; ``write`` does not, and
    may run in another thread. The entries are views of the weights, which are written as they are then.
    ``config`` is saved in place of the model's own, where the run changed that for itself (dropout, caching);
    ``companions`` are files of the run's folder that go with the checkpoint, on rank 0.

    Raises:
        UserError: The folder can't be made; raised on all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        run_dir: Path,
        state: TrainerState,
        cluster: Cluster,
        save_total_limit: int = 0,
        config: PretrainedConfig | None = None,
        companions: Mapping[str, FileRecord] | None = None,
    ) -> None:
        self.path = checkpoint_path(run_dir, state.step)
        self.state = dataclasses.replace(
            state, refused_steps=engine.skipped_steps, loss_scale=_loss_scale(engine.optimizer)
        )
        self.entries, self._metadata = _describe_shard(
            engine, cluster, optimizer_kind(state.optimizer).moments
        )
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._run_dir, self._limit, self._cluster = run_dir, save_total_limit, cluster
        self._lm, self._tokenizer = engine.module.lm, tokenizer
        self._config = config or self._lm.config
        self._companions = companions or {}
        self._written: dict[str, FileRecord] = {}
        self._error: Exception | None = None

        def prepare() -> None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)

        cluster.run_on_first(lambda: _as_user_error(prepare, self.path))

    def write(self) -> None:
        """Write and sync this rank's files; an error is kept for ``commit``."""
        try:
            name = f"rank-{self._cluster.rank:05d}.safetensors"
            self._written = {name: write_safetensors(self._temporary / name, self.entries, self._metadata)}
            if self._cluster.rank == 0:
                self._written |= self._write_plain_files()
        except Exception as error:
            self._error = error

    def commit(self) -> Path:
        """Commit the checkpoint, after ``write`` on every rank; remove the oldest beyond the limit (0: none).

        Raises:
            UserError: Any rank could not write; raised on all. The older checkpoints are as they were, and
                nothing is left of the new one.
        """
        cluster, final = self._cluster, self.path

        def own() -> dict[str, FileRecord]:
            if self._error is not None:
                raise self._error
            return self._written

        def publish() -> None:
            commit(self._temporary, final, files, self.state.step, cluster.world_size, self._companions)

        try:
            written = cluster.run_on_all(lambda: _as_user_error(own, final))
            files = {n: record for part in cluster.all_gather_object(written) for n, record in part.items()}
            cluster.run_on_first(lambda: _as_user_error(publish, final))
        except UserError:
            if cluster.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        cluster.run_on_first(lambda: prune(self._run_dir, self._limit, self.state.step))
        return final

    def _write_plain_files(self) -> dict[str, FileRecord]:
        """Write the small files, which are the same on all ranks; rank 0 does."""
        folder, lm = self._temporary, self._lm
        self._config.architectures = [type(lm).__name__]
        self._config.save_pretrained(folder / MODEL)
        save_lora_config(lm, folder / MODEL)
        if getattr(lm, "generation_config", None) is not None and lm.can_generate():
            lm.generation_config.save_pretrained(folder / MODEL)
        self._tokenizer.save_pretrained(folder / MODEL)
        write_text(folder / STATE, json.dumps(dataclasses.asdict(self.state), indent=2) + "\n")
        paths = [folder / STATE, *(p for p in sorted((folder / MODEL).rglob("*")) if p.is_file())]
        for path in (*paths, folder / MODEL):
            sync(path)
        return {str(path.relative_to(folder)): record_of(path) for path in paths}


def _as_user_error(work: Callable[[], T], final: Path) -> T:
    try:
        return work()
    except OSError as error:
        older = newest_complete(final.parent.parent)
        raise UserError(
            f"checkpoint {final} could not be written: {error.strerror or error}. "
            f"{f'The last complete one is {older.path}' if older else 'There is no complete one yet'}. "
            "Free disk space, then start the same command again: it resumes from there."
        ) from None


def _describe_shard(
    engine: Engine, cluster: Cluster, moment_names: Sequence[str]
) -> tuple[list[Entry], dict[str, str]]:
    """Describe this rank's part: fragments of the trained parameters, their moments, shares of the rest."""
    entries: list[Entry] = []
    segments: dict[str, tuple[int, tuple[int, ...]]] = {}
    optimizer_steps = set()

    def add(key: str, start: int, shape: tuple[int, ...], values: Tensor) -> None:
        segments[key] = (start, shape)
        entries.append(Entry(key, values.dtype, tuple(values.shape), lambda: values))

    for shard in local_shards(engine):
        moments = engine.basic_optimizer.state.get(shard.stepped, {})
        if moments:
            optimizer_steps.add(float(moments.get("step", 0)))
        for offset, fragment in zip(shard.offsets, shard.fragments, strict=True):
            length = fragment.values.numel()
            # In ZeRO-0 every rank holds everything: each writes an equal share.
            first, last = equal_share(length) if engine.zero_optimization_stage() == 0 else (0, length)
            if first == last:
                continue
            position = (fragment.start + first, fragment.shape)
            add(f"weight:{fragment.name}", *position, fragment.values[first:last])
            for kind in moment_names if moments else ():
                add(
                    f"{kind}:{fragment.name}",
                    *position,
                    moments[kind].view(-1)[offset + first : offset + last],
                )
    for name, start, shape, values in frozen_shares(engine):
        add(f"weight:{name}", start, shape, values)
    lm = engine.module.lm
    if cluster.rank == 0:
        persistent = lm.state_dict(keep_vars=True).keys()
        for name, buffer in lm.named_buffers():
            if name in persistent:
                add(f"weight:{name}", 0, tuple(buffer.shape), buffer.reshape(-1))
    assert len(optimizer_steps) <= 1, f"parameters have made different numbers of steps: {optimizer_steps}"
    step = str(optimizer_steps.pop()) if optimizer_steps else ""
    return entries, {"segments": json.dumps(segments), "optimizer_step": step}


def read_state(checkpoint: Checkpoint) -> TrainerState:
    """Read a checkpoint's state besides weights and moments.

    Raises:
        UserError: The file is of another step or version, or a field is wrong.
    """
    path = checkpoint.path / STATE
    state = read_typed(path, TrainerState, "Restore it, or resume from another checkpoint")
    try:
        check_evaluation(state.before)
    except ValueError as error:
        raise UserError(f"damaged (before: {error}). Resume from another checkpoint", path) from error
    if state.step != checkpoint.step:
        raise UserError(f"it is of step {state.step}, and the checkpoint of step {checkpoint.step}", path)
    return state


@torch.no_grad()
def load_checkpoint(engine: Engine, checkpoint: Checkpoint, cluster: Cluster) -> TrainerState:
    """Load weights, buffers, moments and counters into a fresh engine; every rank has to call it.

    Raises:
        UserError: The checkpoint is of another model.
    """
    state = read_state(checkpoint)
    moment_names = optimizer_kind(state.optimizer).moments
    cluster.run_on_all(lambda: _load_shard(engine, checkpoint, moment_names))
    refresh_model_weights(engine)
    engine.global_steps = state.step
    engine.global_samples = state.step * engine.train_batch_size()
    engine.skipped_steps = state.refused_steps
    for holder in _loss_scalers(engine.optimizer):
        vars(holder).update(state.loss_scale)
    return state


def _load_shard(engine: Engine, checkpoint: Checkpoint, moment_names: Sequence[str]) -> None:
    with SegmentReader(checkpoint.shards) as reader:
        for name, buffer in engine.module.lm.named_buffers():
            if f"weight:{name}" in reader.stored:
                reader.read(f"weight:{name}", 0, buffer.view(-1))
        found = [_optimizer_step(metadata, checkpoint) for metadata in reader.metadata]
        steps = [step for step in found if step is not None]
        for shard in local_shards(engine):
            moments = {kind: torch.zeros_like(shard.stepped.data) for kind in moment_names if steps}
            for offset, fragment in zip(shard.offsets, shard.fragments, strict=True):
                stored = reader.stored.get(f"weight:{fragment.name}")
                if stored is None or stored.shape != fragment.shape:
                    is_there = f"shape {stored.shape}" if stored else "no such parameter"
                    raise UserError(
                        f"{checkpoint.path} is of another model: {fragment.name} has shape {fragment.shape} "
                        f"in --model, {is_there} in the checkpoint. Give the model that the run started from."
                    )
                parts = {"weight": fragment.values}
                for kind, moment in moments.items():
                    parts[kind] = moment.view(-1)[offset : offset + fragment.values.numel()]
                for kind, part in parts.items():
                    if reader.read(f"{kind}:{fragment.name}", fragment.start, part) < part.numel():
                        raise UserError(
                            f"damaged (it lacks a part of {kind}:{fragment.name})", checkpoint.path
                        )
            if steps:
                device = shard.stepped.device
                step = torch.tensor(min(steps), dtype=torch.float32, device=device)
                engine.basic_optimizer.state[shard.stepped] = {"step": step, **moments}


def _optimizer_step(metadata: dict[str, str], checkpoint: Checkpoint) -> float | None:
    """Read how many steps the optimizer had made; None where a rank's shard has no moments.

    An optimizer that does not count, such as SGD, has made 0.
    """
    text = metadata.get("optimizer_step", "?")
    if text and not _STEP.fullmatch(text):
        raise UserError(
            f"a shard names the optimizer's step {shown(text)}. Resume from another checkpoint",
            checkpoint.path,
        )
    return float(text) if text else None


def _loss_scalers(optimizer: Any) -> list[Any]:
    """Return the object that holds fp16's dynamic loss scale, under ZeRO 1 to 3."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return [scaler] if getattr(scaler, "dynamic", False) else []


def _loss_scale(optimizer: Any) -> dict[LossScale, float]:
    names: tuple[LossScale, ...] = get_args(LossScale)
    return {name: getattr(scaler, name) for scaler in _loss_scalers(optimizer) for name in names}
