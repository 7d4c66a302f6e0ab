"""The start of a run: its model's weights, or a checkpoint with its companions."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dga_scale.backbone.weights_hash import weights_hash
from dga_scale.checkpoint.companions import bring_companions
from dga_scale.checkpoint.state import STATE, TrainerState, read_state
from dga_scale.checkpoint.store import Checkpoint, find_resume_point, newest_verified
from dga_scale.config.methods.shared import prior_importance_of
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.storage.atomic import storage_errors
from dga_scale.storage.safetensors_stream import record_of
from dga_scale.storage.typed_json import build
from dga_scale.train.inputs import Inputs
from dga_scale.train.schedule import Schedule


@dataclass(frozen=True)
class Start:
    """The start of a run, the same on all ranks.

    Attributes:
        checkpoint: The checkpoint that it resumes from; None: the base model's weights.
        schedule: The schedule of its learning rate.
        optimizer: The name of its optimizer.
        base_model: The hash of the weights that the run, or the one it resumes from, started from.
        prior_importance: The hashes of the files of ``--prior_importance``.
        before: The evaluation of the base model that the checkpoint knows; empty where there is none yet.
        lines: The lines to print about it.

    """

    checkpoint: Checkpoint | None
    schedule: Schedule
    optimizer: str
    base_model: str = ""
    prior_importance: tuple[str, ...] = ()
    before: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return self.checkpoint.step if self.checkpoint else 0

    def state(self, step: int, corpus_hash: str, before: dict[str, Any]) -> TrainerState:
        """Describe the run after ``step`` steps, for a checkpoint."""
        return TrainerState(
            step=step,
            corpus_hash=corpus_hash,
            base_model=self.base_model,
            prior_importance=list(self.prior_importance),
            schedule=dataclasses.asdict(self.schedule),
            before=before,
            optimizer=self.optimizer,
        )


def find_start(inputs: Inputs, cluster: Cluster) -> Start:
    """Choose the start of a run and check that it fits; every rank has to call it, and gets the same.

    A checkpoint of another run is where a new folder starts; once that has checkpoints of its own, it resumes
    from those.

    Raises:
        UserError: On all ranks: a checkpoint that is damaged or of another run than the settings say.

    """
    config, folder = inputs.config, inputs.folder
    start = Start(
        None,
        Schedule.of(config.optimization),
        config.optimization.optimizer,
        cluster.run_on_first(lambda: weights_hash(config.model.model or "", config.model.random_init)),
        cluster.run_on_first(lambda: _prior_importance(inputs)),
    )
    checkpoint = find_resume_point(folder.path, config.run.resume, cluster)
    if checkpoint is not None and not checkpoint.lies_in(folder.path):
        checkpoint = newest_verified(folder.path, cluster) or checkpoint
    if checkpoint is None:
        return start
    found: Checkpoint = checkpoint
    return cluster.run_on_all(lambda: _resumed(start, found, inputs))


def bring(start: Start, inputs: Inputs, cluster: Cluster) -> None:
    """Bring the checkpoint's companions into the run's folder, and remove what its next steps outdate.

    Every rank has to call it, once the folder is there.

    Raises:
        UserError: On all ranks: what goes with the checkpoint is lost or changed, or the disk is full.

    """

    def work() -> None:
        if start.checkpoint is not None:
            with storage_errors(inputs.folder.path):
                bring_companions(start.checkpoint, inputs.folder)
        if start.step < inputs.config.optimization.max_steps:
            inputs.folder.importance_after.unlink(missing_ok=True)

    cluster.run_on_first(work)


def _prior_importance(inputs: Inputs) -> tuple[str, ...]:
    paths = map(Path, prior_importance_of(inputs.config.method))
    return tuple(record_of(path).sha256 for path in paths if path.is_file())


def _resumed(start: Start, checkpoint: Checkpoint, inputs: Inputs) -> Start:
    state, settings, path = read_state(checkpoint), inputs.config.optimization, checkpoint.path
    anew = "or start anew in another --output_dir without --resume"
    if state.corpus_hash != inputs.content_hash:
        raise UserError(
            f"{path} was trained on another corpus than {inputs.corpus.path} is now: restore that, {anew}"
        )
    if state.base_model != start.base_model:
        raise UserError(
            f"{path} was trained from other weights than --model {inputs.config.model.model} holds now: give "
            f"the model that it started from, {anew}"
        )
    if tuple(state.prior_importance) != start.prior_importance:
        raise UserError(
            f"{path} was trained with other files of --prior_importance than these: give those, {anew}"
        )
    if state.optimizer != start.optimizer:
        raise UserError(
            f"--optimizer {start.optimizer}: {path} was trained with {state.optimizer}, whose moments it "
            f"holds: give --optimizer {state.optimizer}, {anew}"
        )
    elsewhere = not checkpoint.lies_in(inputs.folder.path)
    if settings.max_steps < state.step + elsewhere:  # in a folder of its own a finished run has an end to say
        raise UserError(
            f"--max_steps {settings.max_steps}: {path} has done {state.step} steps already. Give more, or go "
            "back to an earlier one: --resume RUN/checkpoints/step-N --output_dir NEW"
        )
    schedule, line = _schedule(_stored_schedule(state.schedule, path), checkpoint, inputs)
    lines = (*checkpoint.skipped, f"resuming from {path}", *([line] if line else []))
    return dataclasses.replace(
        start, checkpoint=checkpoint, schedule=schedule, before=state.before, lines=lines
    )


def _stored_schedule(plain: dict[str, Any], checkpoint: Path) -> Schedule:
    try:
        found: Schedule = build(Schedule, plain, "schedule")
    except ValueError as error:
        raise UserError(
            f"{STATE} is damaged ({error}). Restore it, or resume from another checkpoint", checkpoint
        ) from error
    return found


def _schedule(earlier: Schedule, checkpoint: Checkpoint, inputs: Inputs) -> tuple[Schedule, str]:
    """Return the schedule of the steps to come, and a line about it."""
    settings, done = inputs.config.optimization, checkpoint.step
    extended = earlier.extended(settings, done)
    if extended == earlier:
        return earlier, ""
    if extended is not None:
        return extended, f"learning rate: as in a run of this schedule from its first step on: {extended}"
    if checkpoint.lies_in(inputs.folder.path):
        raise UserError(
            f"--max_steps {settings.max_steps}: the {done} steps done had the learning rates of {earlier}, "
            "which a run of another length would not have had. To train on with a new schedule: --resume "
            f"{checkpoint.path} --output_dir NEW --max_steps {settings.max_steps}"
        )
    new = Schedule.of(settings, first=done)
    return new, f"learning rate: a new schedule: {new}"
