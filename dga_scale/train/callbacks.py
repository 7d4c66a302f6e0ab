"""Callbacks between the steps of a run: evaluations, protection, checks and checkpoints.

The loop calls each ``Callback`` of one list, in its order, on every rank alike::

    on_start(run)       before the first step, on the weights that training starts or resumes from
    after_step(run)     after each optimizer step, once it is logged
    on_end(run)         after the last step; not where a run was asked to stop

What a callback needs it finds in the ``RunState``; what it has to say goes to ``run.log``. A callback may
communicate, as every rank calls it at the same point, and may raise a ``UserError`` on every rank.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dga_scale.backbone.checks import all_finite
from dga_scale.checkpoint.async_save import Saves
from dga_scale.checkpoint.store import newest_complete
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.streams import StepBatches
from dga_scale.errors import UserError
from dga_scale.evaluation.held_out import Evaluator
from dga_scale.launch.world import Cluster
from dga_scale.logging.evaluations import log_before
from dga_scale.logging.records import EVALUATION, TEXTS
from dga_scale.logging.run_log import RunLog
from dga_scale.train.inputs import Inputs
from dga_scale.train.invariants import Invariants
from dga_scale.train.protection import measure_after, protect
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import local_fragments, step_was_refused


@dataclass
class RunState:
    """The state of a run that its callbacks get; the loop alone changes it.

    Attributes:
        trainer: The model and its engine.
        log: The run's log.
        step: The number of finished optimizer steps.
        batches: The batches of the step that was just made; None before the first.
        stopping: Whether this step is the last for now, as a signal asked for.

    """

    trainer: Trainer
    log: RunLog
    step: int
    batches: StepBatches | None = None
    stopping: bool = False

    @property
    def inputs(self) -> Inputs:
        """The run's inputs."""
        return self.trainer.inputs

    @property
    def config(self) -> TrainConfig:
        """All settings."""
        return self.trainer.config

    @property
    def cluster(self) -> Cluster:
        """The ranks."""
        return self.trainer.cluster

    @property
    def last(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.config.optimization.max_steps

    def due(self, every: int) -> bool:
        """Return whether an action is due that comes every so many steps and after the last."""
        return self.last or self.step % every == 0


class Callback:
    """A callback beside the steps of a run; each method does nothing unless it is overridden."""

    def on_start(self, run: RunState) -> None:
        """Act before the first step."""

    def after_step(self, run: RunState) -> None:
        """Act after an optimizer step."""

    def on_end(self, run: RunState) -> None:
        """Act after the last step."""


class Evaluate(Callback):
    """A callback that scores the model on held-out text: at first, every ``--eval_steps`` and at the end."""

    def __init__(self, inputs: Inputs, cluster: Cluster) -> None:
        self._figures: dict[str, float] = {}
        self._evaluator = Evaluator(
            inputs.evaluations,
            inputs.masking,
            batch_size=inputs.resolved.micro_batch_size,
            max_rows=inputs.config.data.max_eval_samples,
            device=cluster.device,
            rank=cluster.rank,
            world_size=cluster.world_size,
            reduce=cluster.sum,
        )

    def on_start(self, run: RunState) -> None:
        if run.step == 0:
            run.trainer.before = self._evaluate(run)
        else:
            log_before(run.log, run.trainer.before)

    def after_step(self, run: RunState) -> None:
        if run.due(run.config.run.eval_steps):
            self._evaluate(run)

    def on_end(self, run: RunState) -> None:
        run.log.outcome(run.config.as_dict(), self._figures)

    def _evaluate(self, run: RunState) -> dict[str, Any]:
        """Score the model and return what was logged."""
        figures = self._figures = self._evaluator.evaluate(run.trainer.engine.module)
        if not figures:
            return {}
        bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if bad:
            found = ", ".join(f"{name} is {value}" for name, value in bad.items())
            raise UserError(f"evaluation after step {run.step}: {found}. {_not_finite(run)}")
        record = {**figures, TEXTS: run.inputs.evaluated_texts}
        run.log.event(EVALUATION, step=run.step, **record)
        losses = [f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items() if "loss" in name]
        run.log.print(f"evaluation after step {run.step}: {', '.join(losses)}")
        return record


class ProtectUnits(Callback):
    """A callback that protects units, and logs their movement every ``--protection_steps``."""

    def on_start(self, run: RunState) -> None:
        protect(run.trainer)

    def after_step(self, run: RunState) -> None:
        if run.due(run.config.run.protection_steps):
            self._log(run)

    def on_end(self, run: RunState) -> None:
        measure_after(run.trainer)

    def _log(self, run: RunState) -> None:
        found = run.trainer.protection.effective()
        applied = run.trainer.protection.applied_over_proposed()
        for kind, units in found.items():
            figures = units.figures()
            if kind in applied:
                figures["applied_over_proposed"] = applied[kind].mean().item()
            run.log.protection(
                kind, step=run.step, one_minus_a=units.target, movement=units.relative, **figures
            )


class LogMethod(Callback):
    """A callback that logs the method's own figures every ``--protection_steps``."""

    def after_step(self, run: RunState) -> None:
        if run.due(run.config.run.protection_steps):
            method = run.trainer.method
            for kind, figures in method.figures().items():
                run.log.event(method.name, step=run.step, kind=kind, **figures)


class CheckInvariants(Callback):
    """A callback that checks the invariants: at the start, every ``--check_invariants`` and at the end."""

    def on_start(self, run: RunState) -> None:
        self._invariants = Invariants(run.trainer, run.config.run.check_invariants)
        self._invariants.check(run.step)

    def after_step(self, run: RunState) -> None:
        assert run.batches is not None
        self._invariants.after_step(run.batches)


class SaveCheckpoints(Callback):
    """A callback that saves every ``--save_steps``, after the last step, and where a run is asked to stop.

    A save that fails on all ranks ends the run only where nothing older is complete, or nothing comes after.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._saves = Saves(background=background)

    @property
    def begun(self) -> int:
        """The number of saves that the run has begun."""
        return self._saves.begun

    @property
    def written(self) -> int:
        """The number of those saves that this rank has written or failed to."""
        return self._saves.written

    def after_step(self, run: RunState) -> None:
        needed = run.last or run.stopping
        if not (needed or run.due(run.config.run.save_steps)):
            return
        started = time.perf_counter()
        self.commit(run)  # the one before
        with self._may_fail(run, unless=needed):
            self._saves.begin(run.trainer.checkpoint(run.step), started)
        if needed or not self._background:
            self.commit(run, needed)

    def commit(self, run: RunState, needed: bool = False) -> None:
        """Wait for the save that is under way and commit it, if there is one; every rank has to call it.

        Raises:
            UserError: It failed, and it is ``needed`` or there is no older checkpoint.
        """
        with self._may_fail(run, unless=needed):
            saved = self._saves.finish()
            if saved is not None:
                figures = {"seconds": saved.seconds, "written_seconds": saved.written_seconds}
                run.log.event("checkpoint", step=saved.step, path=str(saved.path), **figures)

    @contextmanager
    def _may_fail(self, run: RunState, unless: bool) -> Iterator[None]:
        """Let a run continue after a save that failed on all ranks, where there is an older checkpoint.

        The disk may have room again at the next one. A first save has to succeed: what is wrong then is
        rather the folder. So has the last one.
        """
        try:
            yield
        except UserError as error:
            older = run.cluster.run_on_first(lambda: newest_complete(run.inputs.folder.path) is not None)
            if unless or not older:
                raise
            every = run.config.run.save_steps
            run.log.event("save_failed", step=run.step, error=str(error))
            run.log.print(
                f"SAVE FAILED after step {run.step}, training continues: {error} The next save is due after "
                f"step {(run.step // every + 1) * every}."
            )


class RefusedSteps(Callback):
    """A callback that counts steps refused for a NaN or infinity, and stops a run that does not recover.

    Args:
        saver: The callback that has the newest checkpoint, which is named when the run stops.

    """

    def __init__(self, saver: SaveCheckpoints) -> None:
        self._saver = saver
        self._in_a_row = 0

    def after_step(self, run: RunState) -> None:
        if not step_was_refused(run.trainer.engine):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        run.log.event("refused", step=run.step, in_a_row=self._in_a_row)
        run.log.print(f"step {run.step} refused: a NaN or infinity in the loss or the gradient")
        if self._in_a_row >= run.config.optimization.max_bad_steps:
            self._saver.commit(run)
            good = newest_complete(run.inputs.folder.path)
            raise UserError(
                f"{self._in_a_row} steps in a row had a NaN or infinity, the last was {run.step}. "
                f"{_not_finite(run)} Last good checkpoint: {good.path if good else 'none'}. Lower "
                f"--learning_rate{', or use --bf16' if run.inputs.resolved.precision == 'fp16' else ''}."
            )


def _not_finite(run: RunState) -> str:
    """Say which weight is a NaN or infinity, if one is; every rank has to call it."""
    fragments = local_fragments(run.trainer.engine)
    own = next((fragment.name for fragment in fragments if not all_finite(fragment.values)), None)
    names = [name for name in run.cluster.all_gather_object(own) if name is not None]
    return (
        f"The weight {names[0]} holds one." if names else "All weights are finite: a loss or gradient is not."
    )
