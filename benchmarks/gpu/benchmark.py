"""Training on one GPU: RoBERTa-base and large in plain MLM and DGA, in a few minutes and without a network.

    python -m benchmarks.gpu [--smoke] [--minutes 8] [--shapes ...] [--output FILE] [settings of every run]
    python -m benchmarks.gpu --wheels FOLDER ...     what is missing here comes from the wheels in there

Tokens a second, step time, MFU, memory, the best batch, kernels over time, where the device waits for the
host and the host for the device; transformers' Trainer at the same batch; the papers' DA-training projected;
whether two runs with --deterministic are equal bit for bit, and what that costs.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, SECTIONS, keep_section
from benchmarks.gpu.measure import Plan
from benchmarks.gpu.repeat import compared, settled, settled_steps
from benchmarks.gpu.tables import report
from benchmarks.gpu.world import PAPERS, SMOKE, World, make_world
from dga_scale.config.arguments import Parser
from dga_scale.errors import UserError
from tests.helpers.ranks import free_port


class Budget:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self.started = time.time()
        self.seconds = 60 * minutes

    def until(self, share: float) -> float:
        """``time.time()`` when so much of it has passed."""
        return self.started + share * self.seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until(1.0) - time.time()


def main() -> int:
    """Measure what there is time for; the report is written whatever fails."""
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny shapes and few steps, on a CPU too: does it run?")
    add("--minutes", type=float, default=8.0, help="nothing runs longer; what does not fit is left out")
    add("--wheels", metavar="FOLDER", help="wheels of what is missing, installed while this runs")
    add("--shapes", nargs="+", choices=[*PAPERS.shapes, *SMOKE.shapes], help="default: all")
    add("--output", type=Path, help="Markdown file to append to, or folder for gpu.md; default: in runs/")
    add("--work", type=Path, default=ROOT / "runs" / "gpu", help="models, corpus and runs are made here")
    options, settings = parser.parse_known_args()
    scale = SMOKE if options.smoke else PAPERS
    budget = Budget(options.minutes)
    folder = options.work / ("smoke" if options.smoke else "papers")
    world = make_world(folder, scale, options.shapes or list(scale.shapes))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shapes: dict[str, Any] = {}
    for number, shape in enumerate(world.models, 1):
        until = budget.until(0.7 * number / len(world.models))
        shapes[shape] = measured(plan(world, shape, settings, until), budget)
    for shape, found in shapes.items():
        add_trainer(world, shape, found, budget)
    for shape, found in shapes.items():
        add_program(world, shape, found, settings, budget)
    for shape, found in shapes.items():
        add_repeat(world, shape, found, settings, budget)
    output = options.output or (folder / "results.md" if options.smoke else SECTIONS)
    output = output / "gpu.md" if output.is_dir() else output
    body = report(shapes, scale.sequence_length, scale.global_batch)
    keep_section("Training on one GPU", body, output)
    return 0


def plan(world: World, shape: str, settings: list[str], until: float) -> Plan:
    """What ``measure.py`` shall do for a shape."""
    scale = world.scale
    return Plan(
        model=str(world.models[shape]),
        corpus=str(world.corpus),
        folder=str(world.folder / "runs"),
        result=str(world.folder / f"{shape}.result.json"),
        global_batch=scale.global_batch,
        micro_batches={method: list(sizes) for method, sizes in scale.micro_batches.items()},
        steps=scale.steps,
        rounds=scale.rounds,
        warm_up=scale.warm_up,
        importance_rows=scale.importance_rows,
        stages=list(scale.stages),
        settings=settings,
        until=until,
    )


def measured(todo: Plan, budget: Budget) -> dict[str, Any]:
    """What a process of ``measure.py`` found; as far as it came, if it failed."""
    result = Path(todo.result)
    result.unlink(missing_ok=True)
    path = result.with_suffix(".plan.json")
    path.write_text(json.dumps(asdict(todo)))
    why = run(["-m", "benchmarks.gpu.measure", path], budget)
    if not result.exists():
        raise UserError(f"nothing was measured ({why}); what was said is above")
    found: dict[str, Any] = json.loads(result.read_text())
    if why:
        found["failed"]["the rest"] = why
    return found


def add_trainer(world: World, shape: str, found: dict[str, Any], budget: Budget) -> None:
    """Add the Trainer's steps to what was found of a shape, at our best batch for MLM or half of it."""
    if "mlm" not in found["runs"]:
        return
    found["trainer"] = []
    size = found["runs"]["mlm"]["micro_batch"]
    # Logits of every position: it may not fit where ours do.
    for rows in (size, size // 2):
        seconds, why = trainer(world, shape, rows, budget)
        found["trainer"].append({"rows": rows, "sequence_length": world.scale.sequence_length})
        if seconds:
            found["trainer"][-1]["seconds"] = seconds
            break
        found["failed"][f"transformers' Trainer, {rows} rows"] = why


def add_program(world: World, shape: str, found: dict[str, Any], settings: list[str], budget: Budget) -> None:
    """Add the real program's steps, in DGA with masks on the update, to what was found of a shape."""
    if "dga update" not in found["runs"]:
        return
    size = found["runs"]["dga update"]["micro_batch"]
    found["program"], why = program(world, shape, size, settings, budget)
    if why:
        found["failed"]["the real program"] = why


def add_repeat(world: World, shape: str, found: dict[str, Any], settings: list[str], budget: Budget) -> None:
    """Add how two runs of the real program with --deterministic compare to what was found of a shape."""
    if not found.get("program"):
        return
    size, folders = found["runs"]["dga update"]["micro_batch"], []
    for _ in range(2):
        folder, why = run_program(world, shape, size, [*settings, "--deterministic", "true"], budget)
        if why:
            found["failed"]["two runs with --deterministic"] = why
            return
        folders.append(folder)
    found["repeat"] = compared(*folders)


def trainer(world: World, shape: str, rows: int, budget: Budget) -> tuple[list[float], str]:
    """Seconds of the steps of transformers' Trainer under DeepSpeed, and why there are none."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    output, steps = world.folder / "trainer", world.scale.program_steps
    why = run(
        [
            *("-m", "benchmarks.baselines", "trainer", "--model", world.models[shape]),
            *("--corpus", world.corpus, "--output_dir", output, "--steps", steps, "--batch_size", rows),
        ],
        budget,
        alone | {"MASTER_PORT": str(free_port())},
    )
    if why:
        return [], why
    seconds: list[float] = json.loads((output / "steps.json").read_text(encoding="utf-8"))
    return settled(seconds), ""


def program(
    world: World, shape: str, rows: int, settings: list[str], budget: Budget
) -> tuple[dict[str, Any], str]:
    """What a run of the real program logged, and why there is nothing."""
    started = time.time()
    output, why = run_program(world, shape, rows, settings, budget)
    if why:
        return {}, why
    steps = settled_steps(output)
    names = ("step_seconds", "tokens_per_second", "mfu", "data_wait_seconds")
    figures = {name: statistics.median(record[name] for record in steps) for name in names}
    wall, importance = time.time() - started, world.scale.importance_rows
    return {**figures, "steps": len(steps), "wall": wall, "importance_rows": importance}, ""


def run_program(world: World, shape: str, rows: int, settings: list[str], budget: Budget) -> tuple[Path, str]:
    """Run the real program, in DGA with masks on the update: its folder, and how it failed ("": not)."""
    scale = world.scale
    output = world.folder / "runs" / f"{shape}-{time.time_ns()}"
    why = run(
        [
            *("launchers/dga_train.py", "--model", world.models[shape], "--corpus", world.corpus),
            *("--output_dir", output, "--ds_config", "ds_configs/zero2.json"),
            *("--method", "dga", "--soft_mask", "update", "--importance_samples", scale.importance_rows),
            *("--global_batch_size", scale.global_batch, "--per_device_train_batch_size", rows),
            *("--max_steps", scale.program_steps, "--save_steps", scale.program_steps, *settings),
        ],
        budget,
    )
    return output, why


def run(command: list[Any], budget: Budget, environment: dict[str, str] | None = None) -> str:
    """Run Python on ``command`` while there is time, and print what it says; how it failed ("": not)."""
    command = [sys.executable, *map(str, command)]
    if budget.left <= 0:
        return "no time was left"
    print(f"$ {' '.join(command)}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=budget.left)
        ending = said.strip().rpartition("\n")[2][:200]
        why = f"exit code {process.returncode}: {ending}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        why = "no time was left to finish it"
    print(said, flush=True)
    return why
