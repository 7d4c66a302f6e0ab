"""The run, readable from top to bottom: build, evaluate, protect, train, save, finish."""

import contextlib
import socket
import time
from collections.abc import Sequence

import torch

from dga_scale.checkpoint.store import prune, remove_leftovers
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.streams import StepBatches
from dga_scale.launch.determinism import deterministic
from dga_scale.launch.preemption import EXIT_STOPPED, StopConsensus, Stopped, StopRequest
from dga_scale.launch.watchdog import note_step
from dga_scale.launch.world import Cluster
from dga_scale.logging.environment import describe_environment, device_name, write_environment
from dga_scale.logging.run_log import Value, open_log
from dga_scale.logging.throughput import device_peak, memory_gib, rates
from dga_scale.objectives.flops import step_flops
from dga_scale.train.callbacks import (
    Callback,
    CheckInvariants,
    Evaluate,
    LogMethod,
    ProtectUnits,
    RefusedSteps,
    RunState,
    SaveCheckpoints,
)
from dga_scale.train.dry_run import dry_run
from dga_scale.train.finish import finish, has_ended
from dga_scale.train.inputs import Inputs, check_inputs, verify_corpora
from dga_scale.train.resume import Start, bring, find_start
from dga_scale.train.same_run import check_same_data, own_folder
from dga_scale.train.schedule import may_extend
from dga_scale.train.trainer import Trainer
from dga_scale.zero.engine import global_grad_norm


def train(config: TrainConfig, cluster: Cluster, more: Sequence[Callback] = ()) -> int:
    """Run, or resume, one adaptation.

    Args:
        config: All settings.
        cluster: The ranks.
        more: Callbacks of one's own, called after the run's own and before a checkpoint is saved.

    Returns:
        The exit code: 0, or ``EXIT_STOPPED`` after a stop signal.

    Raises:
        UserError: On every rank, with the checkpoints written before intact.

    """
    with StopRequest() as stop, contextlib.suppress(Stopped), contextlib.ExitStack() as held:
        # Once more, for a program of one's own: ``dga-train`` has done it before the process group was there.
        held.enter_context(deterministic(config.run.deterministic))
        consensus = StopConsensus(cluster)
        if consensus.now(stop.requested):  # while the ranks started, or in the domain before
            return EXIT_STOPPED

        # Everything that a user gave is checked before any long work, and the folder owned before it is read.
        inputs = cluster.run_on_all(lambda: check_inputs(config, cluster))
        check_same_data(inputs, cluster)
        if not config.run.dry_run:
            held.enter_context(own_folder(inputs.folder.path, cluster))
            # Another run may have begun and ended here since the inputs were checked.
            cluster.run_on_first(lambda: inputs.folder.check(inputs.config, allowed=may_extend))
        cluster.run_on_all(lambda: verify_corpora(inputs, cluster))
        if config.run.dry_run:
            return dry_run(inputs, cluster)
        if cluster.run_on_first(lambda: has_ended(inputs)):
            return 0
        start = _open_folder(inputs, cluster)
        done, total = start.step, inputs.config.optimization.max_steps

        with open_log(
            inputs.folder.path, cluster.rank, total, completed_steps=done,
            logging_steps=inputs.config.run.logging_steps, loggers=inputs.config.run.loggers,
        ) as log:  # fmt: skip
            log.settings(inputs.config.as_dict())

            def check_stop() -> None:
                if consensus.now(stop.requested):
                    log.print("stopped as asked; the same command begins this measurement again")
                    raise Stopped

            # Build, with all that happens beside the steps in one list.
            trainer = Trainer(inputs, cluster, log, start, check_stop)
            run = RunState(trainer, log, step=done)
            saver = SaveCheckpoints(background=inputs.config.run.async_save)
            callbacks: list[Callback] = [
                Evaluate(inputs, cluster),
                ProtectUnits(),
                LogMethod(),
                CheckInvariants(),
                RefusedSteps(saver),
                *more,
                saver,  # last: a resumed run does not repeat what was logged before the checkpoint
            ]

            # Evaluate and protect.
            for callback in callbacks:
                callback.on_start(run)
            run.stopping = done < total and consensus.now(stop.requested)

            # Train.
            peak_flops = _peak_flops(inputs, cluster)
            with trainer.stream(done) as stream:
                started = time.perf_counter()
                for batches in stream if not run.stopping else ():
                    wait = time.perf_counter() - started
                    terms, learning_rate = trainer.step(batches)
                    run.step, run.batches = batches.step + 1, batches
                    note_step(run.step)
                    own = {"memory_gib": memory_gib(cluster.device)} if log.logs(run.step) else {}
                    figures = consensus.average(terms, stop.requested, saver.written, own)
                    if consensus.written(saver.begun):
                        saver.commit(run)
                    if own:
                        values: dict[str, Value] = {"step": run.step}
                        values |= {name if name in own else f"loss/{name}": v for name, v in figures.items()}
                        values |= trainer.penalty()
                        values |= {"grad_norm": global_grad_norm(trainer.engine)}
                        values |= {"learning_rate": learning_rate, "data_wait_seconds": wait}
                        seconds = time.perf_counter() - started
                        log.step(values | _rates(trainer, batches, seconds, peak_flops))
                    run.stopping = consensus.reached() and not run.last
                    for callback in callbacks:
                        callback.after_step(run)
                    if run.stopping:
                        break
                    started = time.perf_counter()
            if run.stopping:
                log.print(f"stopped after step {run.step} as asked; the same command resumes from there")
                return EXIT_STOPPED

            # Finish.
            for callback in callbacks:
                callback.on_end(run)
        finish(inputs, cluster)
        return 0
    return EXIT_STOPPED


def _open_folder(inputs: Inputs, cluster: Cluster) -> Start:
    """Find where the run starts, make its folder ready, and write what a run says of itself."""
    folder, settings = inputs.folder, inputs.config.run
    cluster.run_on_first(lambda: remove_leftovers(folder.path))
    start = find_start(inputs, cluster)
    if start.checkpoint is not None and start.checkpoint.lies_in(folder.path):
        # A run that was killed may have left one that was due to go.
        limit, step = settings.save_total_limit, start.step
        cluster.run_on_first(lambda: prune(folder.path, limit, step))
    devices = cluster.all_gather_object(device_name(cluster.device))
    hosts = cluster.all_gather_object(socket.gethostname())

    def write() -> None:
        folder.write_config(inputs.config)
        environment = describe_environment(launcher=cluster.launcher, devices=devices, hosts=hosts)
        write_environment(folder.environment, environment)

    cluster.run_on_first(write)
    bring(start, inputs, cluster)
    return start


def _peak_flops(inputs: Inputs, cluster: Cluster) -> float:
    """Return the peak FLOP/s of all devices, in the precision of the forward passes."""
    dtype = torch.float32 if inputs.resolved.precision == "fp32" else torch.bfloat16
    return device_peak(cluster.device, dtype).flops * cluster.world_size


def _rates(trainer: Trainer, batches: StepBatches, seconds: float, peak_flops: float) -> dict[str, float]:
    flops = step_flops(trainer.method, trainer.flops, batches.shape)
    return rates(tokens=sum(batches.tokens_per_source), seconds=seconds, flops=flops, peak_flops=peak_flops)
