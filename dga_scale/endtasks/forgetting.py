"""Measure what a model forgets over a sequence of domains: end tasks after every stage, forgetting rate."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dga_scale.endtasks.recipes import Recipe
from dga_scale.endtasks.seeds import run_seeds, spread, spread_text
from dga_scale.endtasks.tasks import Task
from dga_scale.errors import UserError
from dga_scale.logging.plots import forgetting_figure, save_png
from dga_scale.run_folder import write_text

SCORES = "forgetting"
"""The name of the folder, in that of the sequence, with the scores of single seeds."""

_STAGE = re.compile(r"([0-9]+)-(.+)")


def forgetting_rate(scores: Sequence[Sequence[float]]) -> float:
    """Compute the mean drop of the scores on earlier domains: the mean over k < T of A[k][k] - A[T][k].

    A negative rate means that later domains helped earlier ones. Source: DAS, section 4 (Liu et al., 2020).

    Args:
        scores: A[i][k], the score on domain k after training on domain i; row i has entries up to k = i.
    """
    last = len(scores) - 1
    assert last > 0, "forgetting needs at least two domains"
    return math.fsum(scores[k][k] - scores[last][k] for k in range(last)) / last


@dataclass(frozen=True)
class Stage:
    """A finished run in a sequence of domains."""

    domain: str
    folder: Path

    @property
    def model(self) -> Path:
        """The folder of the model that the stage exported."""
        return self.folder / "model"


def find_stages(run: Path) -> list[Stage]:
    """List the finished stages of a sequence in ``run`` (1-restaurant, 2-acl, ...), in their order.

    Raises:
        UserError: The folder does not exist, fewer than two stages are finished, or a stage is missing.
    """
    if not run.is_dir():
        raise UserError("no such folder. Give the folder of a run over several domains.", run)
    found: dict[int, Stage] = {}
    for folder in sorted(run.iterdir()):
        if folder.is_dir() and (match := _STAGE.fullmatch(folder.name)):
            found[int(match[1])] = Stage(match[2], folder)
    finished = []
    for number in range(1, len(found) + 1):
        if number not in found:
            names = ", ".join(stage.folder.name for stage in found.values())
            raise UserError(
                f"stage {number} of its sequence of domains is missing: it holds {names}. Restore it.", run
            )
        if not found[number].model.is_dir():
            break
        finished.append(found[number])
    if len(finished) < 2:
        raise UserError(
            f"{len(finished)} finished stages (folders such as 1-restaurant with a model/). Forgetting needs "
            "two: give the folder of a run over several domains, or resume the run.",
            run,
        )
    return finished


def measure_forgetting(
    run: Path, tasks: dict[str, tuple[Task, Recipe]], seeds: Sequence[int], *, jobs: int = 1
) -> dict[str, Any]:
    """Fine-tune each stage's model on the tasks of the domains seen so far; finished seeds are not repeated.

    Scores of single seeds lie in ``run/forgetting/STAGE/DOMAIN/``; the result is ``run/forgetting.json``.

    Args:
        run: The folder of the sequence.
        tasks: The task and recipe of each finished stage's domain; the score is the recipe's metric.
        seeds: The seeds, the same for every stage.
        jobs: The number of seeds at a time.

    Returns:
        ``domains``; ``metrics`` and ``tasks`` of each; ``scores``: A[i][k] over seeds (mean, std, by_seed),
        row i up to k = i; ``forgetting_rate`` over seeds.

    Raises:
        UserError: As ``find_stages``; or a finished stage has no task, or a task no stage.
    """
    stages = find_stages(run)
    domains = [stage.domain for stage in stages]
    for domain in domains:
        if domain not in tasks:
            raise UserError(f"stage {domain} of {run} has no task. Add --task {domain}=DIR.")
    for domain in tasks:
        if domain not in domains:
            names = ", ".join(domains)
            raise UserError(f"--task {domain}=...: {run} has no finished stage of that name ({names}).")
    rows: list[list[dict[str, Any]]] = []
    for number, stage in enumerate(stages, 1):
        row = []
        for domain in domains[:number]:
            task, recipe = tasks[domain]
            output = run / SCORES / stage.folder.name / domain
            summary = run_seeds(str(stage.model), task, recipe, seeds, output, jobs=jobs)
            row.append(summary["scores"][recipe.metric])
        rows.append(row)
    rates = {
        seed: forgetting_rate([[score["by_seed"][str(seed)] for score in row] for row in rows])
        for seed in seeds
    }
    result = {
        "domains": domains,
        "tasks": [tasks[domain][0].name for domain in domains],
        "metrics": [tasks[domain][1].metric for domain in domains],
        "scores": rows,
        "forgetting_rate": spread(rates),
    }
    write_text(run / "forgetting.json", json.dumps(result, indent=2) + "\n")
    return result


def print_forgetting(result: dict[str, Any], run: Path, seeds: int) -> None:
    """Print the scores of ``measure_forgetting`` as a table, and write ``run/forgetting.png``."""
    domains = result["domains"]
    table = Table(title=f"end-task score, {seeds} seeds")
    table.add_column("after")
    for domain, metric in zip(domains, result["metrics"], strict=True):
        table.add_column(f"{domain}\n{metric}", justify="right")
    for domain, row in zip(domains, result["scores"], strict=True):
        table.add_row(domain, *(spread_text(score) for score in row))
    Console().print(table)
    rate = result["forgetting_rate"]
    kind = "lost" if rate["mean"] > 0 else "gained"
    print(f"forgetting rate: {spread_text(rate)} (earlier domains {kind} that much by the end)")
    means = [[score["mean"] for score in row] for row in result["scores"]]
    save_png(forgetting_figure(domains, means), run / "forgetting.png")
    print(f"results: {run / 'forgetting.json'}, {run / 'forgetting.png'}")
