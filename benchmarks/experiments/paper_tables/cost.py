"""What a comparison costs on a cluster, before it is paid for: the planner's times, summed up."""

from dataclasses import dataclass

from benchmarks.common import table
from benchmarks.experiments.paper_tables.settings import Flags, Settings
from dga_scale.errors import UserError
from dga_scale.planning.gpus import find_gpu
from dga_scale.planning.plan import Cluster, Plan, make_planner
from dga_scale.zero.ds_keys import load_ds_config

HOUR = 3600


@dataclass(frozen=True)
class Training:
    """All trainings of one method."""

    name: str
    plan: Plan
    runs: int
    steps: int

    def gpu_hours(self, gpus: int) -> float:
        """Return the hours of all runs, times the GPUs."""
        return self.runs * self.steps * self.plan.time.step * gpus / HOUR


def trainings(settings: Settings) -> list[Training]:
    """Plan each method, of one domain at a time and in sequence.

    Raises:
        UserError: the YAML has no ``plan``, or a method fits no way.

    """
    asked = [(name, flags, len(settings.domains)) for name, flags in settings.trained().items()]
    if sequence := settings.sequence:
        domains = len(sequence.domains)
        asked += [(f"{name}, in sequence", flags, domains) for name, flags in sequence.methods.items()]
    return [_planned(settings, name, flags, domains) for name, flags, domains in asked]


def print_cost(settings: Settings) -> int:
    """Print GPU hours of every method, and of all."""
    found = trainings(settings)
    assert settings.plan is not None
    gpus = settings.plan.gpus
    rows = [["method", "rows a rank", "step, s", "trainings", "hours of one", "GPU hours of all"]]
    for each in found:
        one = f"{each.steps * each.plan.time.step / HOUR:.2f}"
        cells = [each.name, str(each.plan.choice.micro_batch), f"{each.plan.time.step:.3f}", str(each.runs)]
        rows.append([*cells, one, f"{each.gpu_hours(gpus):.1f}"])
    total = sum(each.gpu_hours(gpus) for each in found)
    rows.append(["all", "", "", str(sum(each.runs for each in found)), "", f"{total:.0f}"])
    domains, general, seeds = len(settings.domains), len(settings.general.tasks), len(settings.seeds)
    # The base is scored once on each task, every model on its domain's and all general ones.
    scored = domains + general + len(settings.methods) * seeds * domains * (1 + general)
    if settings.sequence:
        stages = len(settings.sequence.domains)
        scored += len(settings.sequence.methods) * seeds * stages * (stages + 1) // 2
    print(
        f"{table(rows)}\n\n{gpus} GPUs ({settings.plan.gpu}), {total / gpus:.0f} hours of all of them. Times "
        "are worked out, not measured: see tools/plan.py. Not in them: start-up, evaluation, measuring "
        f"importance and the Fisher, and {scored * settings.evaluation.seeds:,} fine-tunings, "
        "each on one GPU."
    )
    return 0


def _planned(settings: Settings, name: str, flags: Flags, domains: int) -> Training:
    if settings.plan is None:
        raise UserError("--plan: the YAML names no machines. Write `plan: {gpus: 8, gpu: h100}`, say.")
    config, machines = settings.config(flags), settings.plan
    cluster = Cluster(machines.gpus, machines.gpus_per_node, find_gpu(machines.gpu))
    length = settings.sharding.get("sequence_length")
    planner = make_planner(config, load_ds_config(settings.ds_config), cluster, length)
    plan: Plan | None = planner.as_configured()
    if plan is None or not plan.fits:
        plan = planner.recommended()
    if plan is None:
        raise UserError(f"--plan: --method {flags.get('method')} fits no way on {machines.gpus} GPUs.")
    return Training(name, plan, domains * len(settings.seeds), config.optimization.max_steps)
