"""Build a run's weight penalty at its starting weights, with a Fisher where the method asks for one."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dga_scale.checkpoint.fisher import load_fisher, read_measured, save_fisher
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.streams import EvalBatches
from dga_scale.launch.world import Cluster
from dga_scale.logging.run_log import RunLog
from dga_scale.preservation.fisher import Fisher, measure_fisher
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import (
    WeightPenalty,
    WeightRegularisation,
    key_of,
)
from dga_scale.train.inputs import Inputs
from dga_scale.train.resume import Start
from dga_scale.zero.engine import Engine
from dga_scale.zero.optimizer_hooks import add_to_gradients, local_fragments

_QUANTILE = "log10_q"


def build_weight_penalty(
    engine: Engine,
    plan: WeightRegularisation,
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    start: Start,
    check_stop: Callable[[], None] = lambda: None,
) -> WeightPenalty:
    """Regularise the weights towards their present values at each step; every rank has to call it.

    Call it on a new engine, before a checkpoint is loaded into it: a resumed run then has the same starting
    weights as before, and loads the Fisher that it measured. So does a run that has no checkpoint yet.

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
        elif start.checkpoint is not None and cluster.run_on_first(folder.is_dir):
            fisher = load_fisher(folder, fragments, cluster)
        else:
            measured = cluster.run_on_first(lambda: read_measured(folder))
            if measured.get("base_model") == start.base_model:
                fisher = load_fisher(folder, fragments, cluster)
            else:
                found = _measure(engine, plan, inputs, cluster, log, fragments, check_stop)
                fisher, figures = found.values, _figures(found)
                measured = {"base_model": start.base_model, "figures": figures}
                save_fisher(folder, fisher, fragments, cluster, copies, measured)
            _log(measured["figures"], log)
    penalty = WeightPenalty(fragments, plan.weight, fisher, copies)
    add_to_gradients(engine, penalty.add_gradient)
    mebibytes = penalty.bytes_per_rank() / 2**20
    log.print(f"weight regularisation towards the starting weights: {mebibytes:.1f} MiB on this rank")
    return penalty


def _measure(
    engine: Engine,
    plan: WeightRegularisation,
    inputs: Inputs,
    cluster: Cluster,
    log: RunLog,
    fragments: Sequence[Fragment],
    check_stop: Callable[[], None],
) -> Fisher:
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
    return measure_fisher(engine.module, on_device(), fragments, cluster.sum, normalize=plan.normalize)


def _figures(fisher: Fisher) -> dict[str, float]:
    quantiles = {f"{_QUANTILE}{100 * q:g}": value for q, value in fisher.log10_quantiles.items()}
    return {"mean": fisher.mean, "zeros": fisher.zeros, "examples": fisher.examples, **quantiles}


def _log(figures: Mapping[str, float], log: RunLog) -> None:
    log.event("fisher", step=0, **figures)
    quantiles = {name.removeprefix(_QUANTILE): v for name, v in figures.items() if name.startswith(_QUANTILE)}
    spread = ", ".join(f"{q}% {value:.1f}" for q, value in quantiles.items())
    log.print(f"Fisher: mean {figures['mean']:.3g} before scaling; quantiles of log10 F: {spread}")
