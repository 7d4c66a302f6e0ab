"""Build a run's weight penalty at its starting weights, with a Fisher where the method asks for one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dga_scale.checkpoint.fisher import load_fisher, save_fisher
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.launch.world import Cluster
from dga_scale.logging.run_log import RunLog
from dga_scale.preservation.fisher import Fisher, measure_fisher
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import (
    FragmentKey,
    WeightPenalty,
    WeightRegularisation,
    key_of,
)
from dga_scale.train.inputs import Inputs
from dga_scale.zero.engine import Engine
from dga_scale.zero.optimizer_hooks import add_to_gradients, local_fragments


def build_weight_penalty(
    engine: Engine,
    plan: WeightRegularisation,
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    check_stop: Callable[[], None] = lambda: None,
) -> WeightPenalty:
    """Regularise the weights towards their present values at each step; every rank has to call it.

    Call it on a new engine, before a checkpoint is loaded into it: a resumed run then has the same starting
    weights as before, and loads the Fisher that it measured.

    Raises:
        UserError: The Fisher can't be measured, written or read; raised on every rank.

    """
    fragments = local_fragments(engine)
    copies = cluster.world_size if engine.zero_optimization_stage() == 0 else 1
    fisher = None
    if plan.fisher_samples is not None:
        folder = inputs.folder.fisher
        if inputs.config.run.dry_run:  # what it needs of memory, without the work
            fisher = {key_of(f): torch.ones_like(f.values, dtype=torch.float32) for f in fragments}
        elif cluster.run_on_first(folder.is_dir):
            fisher = load_fisher(folder, fragments, cluster)
        else:
            fisher = _measured(engine, plan, inputs, cluster, log, fragments, folder, copies, check_stop)
    penalty = WeightPenalty(fragments, plan.weight, fisher, copies)
    add_to_gradients(engine, penalty.add_gradient)
    mebibytes = penalty.bytes_per_rank() / 2**20
    log.print(f"weight regularisation towards the starting weights: {mebibytes:.1f} MiB on this rank")
    return penalty


def _measured(
    engine: Engine,
    plan: WeightRegularisation,
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    fragments: Sequence[Fragment],
    folder: Path,
    copies: int,
    check_stop: Callable[[], None],
) -> dict[FragmentKey, Tensor]:
    assert inputs.general is not None, "the method's check sees to it"
    assert plan.fisher_samples is not None
    batches = EvalBatches(
        inputs.general,
        inputs.masking,
        batch_size=1,  # it reads example by example
        rank=cluster.rank,
        world_size=cluster.world_size,
        max_rows=plan.fisher_samples,
    )

    def on_device() -> Iterator[Batch]:
        for batch in log.track(batches, len(batches), "Fisher"):
            check_stop()
            yield batch.to(cluster.device)

    log.print(f"measuring the Fisher on {min(plan.fisher_samples, len(inputs.general))} rows of general text")
    fisher = measure_fisher(engine.module, on_device(), fragments, cluster.sum, normalize=plan.normalize)
    save_fisher(folder, fisher.values, fragments, cluster, copies)
    _log(fisher, log)
    return fisher.values


def _log(fisher: Fisher, log: RunLog) -> None:
    quantiles = {f"log10_q{100 * q:g}": value for q, value in fisher.log10_quantiles.items()}
    log.event("fisher", step=0, mean=fisher.mean, zeros=fisher.zeros, examples=fisher.examples, **quantiles)
    spread = ", ".join(f"{100 * q:g}% {value:.1f}" for q, value in fisher.log10_quantiles.items())
    log.print(f"Fisher: mean {fisher.mean:.3g} before scaling; quantiles of log10 F: {spread}")
