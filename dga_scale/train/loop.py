"""The run, readable from top to bottom: build, evaluate, protect, train, save, hand back."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dga_scale.checkpoint.async_save import Saves
from dga_scale.checkpoint.store import (
    Checkpoint,
    find_resume_point,
    newest_complete,
    prune,
    remove_leftovers,
)
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.batches import StepBatches
from dga_scale.errors import UserError
from dga_scale.evaluation.held_out import Evaluator
from dga_scale.launch.preemption import EXIT_STOPPED, StopConsensus, StopRequest
from dga_scale.launch.watchdog import note_step
from dga_scale.launch.world import Cluster
from dga_scale.logging.environment import describe_environment, device_name, write_environment
from dga_scale.logging.evaluations import EVALUATION
from dga_scale.logging.metrics import RunLog, Value
from dga_scale.logging.throughput import device_peak, memory_gib, rates, step_flops
from dga_scale.train.dry_run import dry_run
from dga_scale.train.finish import hand_over
from dga_scale.train.inputs import Inputs, check_inputs, verify_corpora
from dga_scale.train.invariants import Invariants
from dga_scale.train.same_run import check_same_data, check_shared_folder
from dga_scale.train.trainer import Session
from dga_scale.zero.engine import global_grad_norm
from dga_scale.zero.optimizer_hooks import step_was_refused


def train(config: TrainConfig, cluster: Cluster) -> int:
    """Run, or go on with, one adaptation; the exit code (0, or ``EXIT_STOPPED`` after a stop signal).

    Raises:
        UserError: on every rank, with the checkpoints written before intact.
    """
    with StopRequest() as stop:
        if StopConsensus(cluster).now(stop.requested):  # while the ranks started, or in the domain before
            return EXIT_STOPPED
        inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
        check_same_data(inputs, cluster)
        cluster.run_on_all(lambda: verify_corpora(inputs, cluster))
        if config.run.dry_run:
            return dry_run(inputs, cluster)
        cluster.run_on_first(lambda: remove_leftovers(inputs.folder.path))
        resume_from = find_resume_point(inputs.folder.path, config.run.resume, cluster)
        if resume_from is not None and resume_from.lies_in(inputs.folder.path):
            # A run that was killed may have left one that was due to go.
            limit, step = config.run.save_total_limit, resume_from.step
            cluster.run_on_first(lambda: prune(inputs.folder.path, limit, step))
        _open_folder(inputs, cluster)
        done = resume_from.step if resume_from else 0
        total = config.optimization.max_steps
        with RunLog(
            inputs.folder.path, cluster.rank, total, completed_steps=done,
            logging_steps=config.run.logging_steps,
        ) as log:  # fmt: skip
            run = _Run(inputs, cluster, log, resume_from)
            finished = run.train(stop)
            if not finished:
                log.print(f"stopped after step {run.done} as asked; the same command goes on from there")
                return EXIT_STOPPED
        hand_over(inputs, cluster)
    return 0


def _open_folder(inputs: Inputs, cluster: Cluster) -> None:
    """Write what a run says of itself before it starts."""
    devices = cluster.all_gather_object(device_name(cluster.device))
    hosts = cluster.all_gather_object(socket.gethostname())

    def write() -> None:
        inputs.folder.write_config(inputs.config)
        environment = describe_environment(launcher=cluster.launcher, devices=devices, hosts=hosts)
        write_environment(inputs.folder.environment, environment)

    cluster.run_on_first(write)
    check_shared_folder(inputs.folder.path, cluster)


class _Run:
    """The steps of one run, with what it counts."""

    def __init__(self, inputs: Inputs, cluster: Cluster, log: RunLog, resume_from: Checkpoint | None) -> None:
        self.inputs, self.cluster, self.log = inputs, cluster, log
        self.done = resume_from.step if resume_from else 0
        self.settings = inputs.config.run
        self.total = inputs.config.optimization.max_steps
        self.bad_steps = 0
        self.figures: dict[str, float] = {}
        log.settings(inputs.config.as_dict())
        self.session = Session(inputs, cluster, log, resume_from)
        self.evaluator = Evaluator(
            inputs.evaluations,
            inputs.masking,
            batch_size=inputs.resolved.micro_batch_size,
            max_rows=inputs.config.data.max_eval_samples,
            device=cluster.device,
            rank=cluster.rank,
            world_size=cluster.world_size,
            reduce=cluster.sum,
        )
        self.saves = Saves(background=self.settings.async_save)
        dtype = torch.float32 if inputs.resolved.precision == "fp32" else torch.bfloat16
        self.peak_flops = device_peak(cluster.device, dtype).flops * cluster.world_size

    def train(self, stop: StopRequest) -> bool:
        """All steps that are left; False if a signal ended them early (everything is saved then)."""
        session, log = self.session, self.log
        consensus = StopConsensus(self.cluster)
        if self.done == 0:
            self._evaluate()
        session.protect()
        if self.done < self.total and consensus.now(stop.requested):
            return False  # so far nothing was done that is not saved
        invariants = Invariants(session, self.settings.check_invariants)
        invariants.check(self.done)
        with session.stream(self.done) as stream:
            started = time.perf_counter()
            for batches in stream:
                wait = time.perf_counter() - started
                terms, learning_rate = session.train_step(batches)
                self.done = batches.step + 1
                note_step(self.done)
                invariants.after_step(batches)
                logs = log.logs(self.done)
                own = {"memory_gib": memory_gib(self.cluster.device)} if logs else {}
                figures = consensus.average(terms, stop.requested, self.saves.written, own)
                if consensus.written(self.saves.begun):
                    self._finish_save()
                self._count_refused()
                if logs:
                    values: dict[str, Value] = {"step": self.done}
                    values |= {name if name in own else f"loss/{name}": v for name, v in figures.items()}
                    values |= session.penalty()
                    values |= {"grad_norm": global_grad_norm(session.engine), "learning_rate": learning_rate}
                    values |= {"data_wait_seconds": wait}
                    log.step(values | self._rates(batches, time.perf_counter() - started))
                stopping = consensus.reached() and self.done < self.total
                self._between_steps(stopping)
                if stopping:
                    return False
                started = time.perf_counter()
        session.finish()
        log.outcome(self.inputs.config.as_dict(), self.figures)
        return True

    def _between_steps(self, stopping: bool) -> None:
        """What is due after a step: effective protection, evaluation, a checkpoint."""
        last = self.done == self.total
        if last or self.done % self.settings.protection_steps == 0:
            self._log_protection()
        if last or self.done % self.settings.eval_steps == 0:
            self._evaluate()
        if last or stopping or self.done % self.settings.save_steps == 0:
            self._save(needed=last or stopping)

    def _save(self, needed: bool) -> None:
        """Begin a checkpoint, and finish it too if training or the end waits for it."""
        started = time.perf_counter()
        self._finish_save()  # of the one before
        with self._may_fail(unless=needed):
            self.saves.begin(self.session.checkpoint(self.done), started)
        if needed or not self.settings.async_save:
            self._finish_save(needed)

    def _finish_save(self, needed: bool = False) -> None:
        """Commit the checkpoint under way, if there is one."""
        with self._may_fail(unless=needed):
            saved = self.saves.finish()
            if saved is not None:
                figures = {"seconds": saved.seconds, "written_seconds": saved.written_seconds}
                self.log.event("checkpoint", step=saved.step, path=str(saved.path), **figures)

    @contextmanager
    def _may_fail(self, unless: bool) -> Iterator[None]:
        """Let a run go on from a save that failed on all ranks, where there is an older checkpoint.

        The disk may have room again at the next one. A first save has to succeed: what is wrong then is
        rather the folder. So has the last one.
        """
        try:
            yield
        except UserError as error:
            older = self.cluster.run_on_first(lambda: newest_complete(self.inputs.folder.path) is not None)
            if unless or not older:
                raise
            self.log.event("save_failed", step=self.done, error=str(error))
            self.log.print(
                f"SAVE FAILED after step {self.done}, training goes on: {error} The next save is due after "
                f"step {(self.done // self.settings.save_steps + 1) * self.settings.save_steps}."
            )

    def _evaluate(self) -> None:
        figures = self.figures = self.evaluator.evaluate(self.session.engine.module)
        if figures:
            texts = self.inputs.evaluated_texts
            self.log.event(EVALUATION, step=self.done, **figures, texts=texts)
            losses = [f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items() if "loss" in name]
            self.log.print(f"evaluation after step {self.done}: {', '.join(losses)}")

    def _log_protection(self) -> None:
        found = self.session.effective_protection()
        applied = self.session.applied_over_proposed()
        for kind, units in found.items():
            figures = units.figures()
            if kind in applied:
                figures["applied_over_proposed"] = applied[kind].mean().item()
            self.log.protection(
                kind, step=self.done, one_minus_a=units.target, movement=units.relative, **figures
            )

    def _count_refused(self) -> None:
        """Stop a run that has left the numbers for good."""
        if not step_was_refused(self.session.engine):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.log.event("refused", step=self.done, in_a_row=self.bad_steps)
        self.log.print(f"step {self.done} refused: a NaN or infinity in the loss or the gradient")
        if self.bad_steps >= self.inputs.config.optimization.max_bad_steps:
            self._finish_save()
            good = newest_complete(self.inputs.folder.path)
            raise UserError(
                f"{self.bad_steps} steps in a row had a NaN or infinity, the last was {self.done}. Last good "
                f"checkpoint: {good.path if good else 'none'}. Lower --learning_rate, or use --bf16 "
                "instead of fp16."
            )

    def _rates(self, batches: StepBatches, seconds: float) -> dict[str, float]:
        flops = step_flops(
            self.session.anatomy,
            views=len(self.session.model.views),
            rows_by_width=batches.rows_by_width,
            head_tokens=batches.head_positions,
        )
        tokens = sum(batches.tokens_per_source)
        return rates(tokens=tokens, seconds=seconds, flops=flops, peak_flops=self.peak_flops)
