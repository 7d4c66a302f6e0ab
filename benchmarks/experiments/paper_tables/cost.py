"""What a comparison costs on a cluster, before it is paid for: the planner's times, summed up."""

from dataclasses import dataclass

from benchmarks.experiments.paper_tables.settings import Flags, Settings, as_flags
from benchmarks.experiments.paper_tables.tables import table
from dga_scale.config.parsing import read_config
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
        return self.runs * self.steps * self.plan.time.step * gpus / HOUR


def trainings(settings: Settings) -> list[Training]:
    """The plan of each method, of one domain at a time and in sequence.

    Raises:
        UserError: the YAML has no ``plan``, or a method fits no way.

    """
    if settings.plan is None:
        raise UserError("--plan: the YAML names no machines. Write `plan: {gpus: 8, gpu: h100}`, say.")
    asked = [(name, flags, len(settings.domains)) for name, flags in settings.trained().items()]
    if settings.sequence:
        domains = len(settings.sequence.domains)
        asked += [
            (f"{name}, in sequence", flags, domains) for name, flags in settings.sequence.methods.items()
        ]
    return [
        Training(name, _plan(settings, flags), domains * len(settings.seeds), _steps(settings, flags))
        for name, flags, domains in asked
    ]


def print_cost(settings: Settings) -> int:
    """Print GPU hours of every method, and of all."""
    found = trainings(settings)
    assert settings.plan is not None
    gpus = settings.plan.gpus
    rows = [["method", "rows a rank", "step, s", "trainings", "hours of one", "GPU hours of all"]]
    for each in found:
        one = each.steps * each.plan.time.step / HOUR
        cells = [each.name, str(each.plan.choice.micro_batch), f"{each.plan.time.step:.3f}", str(each.runs)]
        rows.append([*cells, f"{one:.2f}", f"{each.gpu_hours(gpus):.1f}"])
    total = sum(each.gpu_hours(gpus) for each in found)
    rows.append(["all", "", "", str(sum(each.runs for each in found)), "", f"{total:.0f}"])
    print(table(rows))
    models = len(settings.methods) * len(settings.seeds)
    tasks = len(settings.domains) * (1 + len(settings.general.tasks))
    seeds = settings.evaluation.seeds
    base = (len(settings.domains) + len(settings.general.tasks)) * seeds
    fine_tunings = models * tasks * seeds + base
    if settings.sequence:
        count = len(settings.sequence.domains)
        fine_tunings += (
            len(settings.sequence.methods) * len(settings.seeds) * count * (count + 1) // 2 * seeds
        )
    print(
        f"\n{gpus} GPUs ({settings.plan.gpu}), {total / gpus:.0f} hours of all of them. Times are worked "
        "out, not measured: see tools/plan.py. Not in them: start-up, evaluation, measuring importance and "
        f"the Fisher, and {fine_tunings:,} fine-tunings, each on one GPU."
    )
    return 0


def _plan(settings: Settings, flags: Flags) -> Plan:
    assert settings.plan is not None
    words = ["--model", settings.model, "--corpus", "any", "--ds_config", settings.ds_config]
    config = read_config([*words, *as_flags(settings.train_flags(flags))])
    cluster = Cluster(settings.plan.gpus, settings.plan.gpus_per_node, find_gpu(settings.plan.gpu))
    planner = make_planner(
        config, load_ds_config(settings.ds_config), cluster, settings.sharding.get("sequence_length")
    )
    plan = planner.as_configured()
    best = plan if plan.fits else planner.recommended()
    if best is None:
        raise UserError(f"--plan: --method {flags.get('method')} fits no way on {settings.plan.gpus} GPUs.")
    return best


def _steps(settings: Settings, flags: Flags) -> int:
    return int(settings.train_flags(flags)["max_steps"])
