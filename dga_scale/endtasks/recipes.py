"""The fine-tuning settings of each end task: the papers' settings by the name of the task's folder."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dga_scale.endtasks.metrics import CLASSIFICATION, REGRESSION
from dga_scale.endtasks.tasks import Task, class_shares, load_task, majority_share
from dga_scale.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """The settings of a fine-tuning; the defaults are those of DGA's released code, plus early stopping."""

    epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    """The share of the steps in which the learning rate rises, before it falls linearly to 0. Without warm-up
    some seeds fail on small tasks (Mosbach et al., arXiv 2006.04884)."""
    max_length: int = 164
    patience: int = 3
    """The epochs without a better score on dev after which training stops; the best epoch is chosen."""
    metric: str = "macro_f1"
    """The score that is reported first, and by which the epoch is chosen on dev."""
    pair_first: bool = False
    """Whether text_pair comes before text: in aspect sentiment the aspect comes first."""
    precision: str = "bf16"
    """The precision: "bf16" (autocast) or "fp32"."""

    def check(self, *, regression: bool) -> None:
        """Refuse settings that are out of their range.

        Raises:
            UserError: A setting is out of its range, or the kind of task does not have the metric.
        """
        metrics = REGRESSION if regression else CLASSIFICATION
        if self.metric not in metrics:
            kind = "a regression" if regression else "a classification"
            raise UserError(f"--metric {self.metric}: the task is {kind}, choose of {', '.join(metrics)}.")
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1.")
        for name in ("epochs", "batch_size", "patience", "max_length"):
            if getattr(self, name) >= 2**31:
                raise UserError(f"--{name} {getattr(self, name)}: must be below {2**31}.")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"--precision {self.precision}: must be bf16 or fp32.")
        if self.max_length < 8:
            raise UserError(f"--max_length {self.max_length}: must be at least 8.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning_rate {self.learning_rate:g}: must be above 0, and finite.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight_decay {self.weight_decay:g}: must be 0 or more, and finite.")


OVERRIDES = ("epochs", "batch_size", "learning_rate", "weight_decay", "max_length", "patience", "metric",
             "precision")  # fmt: skip
"""The settings of a recipe that a flag, or a line in a suite, of the same name overrides."""

LIMITS = {f"max_{split}_examples": split for split in ("train", "dev", "test")}
"""The settings that limit the examples of a split, by their names."""

RECIPES = {
    "asc_restaurant": Recipe(epochs=5, pair_first=True),
    "asc_phone": Recipe(epochs=15, pair_first=True),
    "asc_camera": Recipe(epochs=15, pair_first=True),
    "aclarc_citation_intent": Recipe(epochs=10),
    "scierc_relation": Recipe(epochs=5),
    "chemprot": Recipe(epochs=10, metric="micro_f1"),
    "cola": Recipe(metric="matthews"),
    "stsb": Recipe(metric="pearson"),
    "sst2": Recipe(epochs=3, metric="accuracy"),
    "rte": Recipe(epochs=10, metric="accuracy"),
    "mrpc": Recipe(metric="accuracy"),
    "trec": Recipe(metric="accuracy"),
}
"""The recipes by the tasks' names; the first six are DGA's, and GLUE's metrics are its own."""


def recipe_for(task: str, *, regression: bool) -> Recipe:
    """Find the recipe of a task by its name or the beginning of it (``asc_phone_dga_split``)."""
    for name in sorted(RECIPES, key=len, reverse=True):
        if task == name or task.startswith(f"{name}_"):
            return RECIPES[name]
    return Recipe(metric="pearson" if regression else "macro_f1")


def load_with_recipe(folder: str | Path, overrides: Mapping[str, Any]) -> tuple[Task, Recipe]:
    """Load a task limited by the ``LIMITS`` among ``overrides``, and its recipe with the other overrides.

    Raises:
        UserError: As ``load_task``; or settings do not suit the task.
    """
    limits = {split: overrides[name] for name, split in LIMITS.items() if name in overrides}
    settings = {name: value for name, value in overrides.items() if name not in LIMITS}
    task = load_task(folder).with_at_most(**limits)
    recipe = dataclasses.replace(recipe_for(task.name, regression=task.regression), **settings)
    recipe.check(regression=task.regression)
    return task, recipe


def describe(task: Task, recipe: Recipe) -> str:
    """Describe a task and how it is fine-tuned, in two or three lines for people."""
    kind = "regression" if task.regression else f"{len(task.labels)} classes"
    stop = f"stops {recipe.patience} epochs after the best on dev" if task.dev else "takes the last epoch"
    majority = (
        "" if task.regression else f"; always the largest class: accuracy {majority_share(task.test):.3f}"
    )
    balance = ""
    if not task.regression:
        shares = class_shares(task.train)
        (largest, most), (smallest, least) = shares[0], shares[-1]
        balance = f"classes of train: {largest} {most:.1%} the largest, {smallest} {least:.1%} the smallest\n"
    left_out = f", {task.left_out:,} left out" if task.left_out else ""
    return (
        f"{task.name}: {kind}, {len(task.train):,} train, {len(task.dev):,} dev, {len(task.test):,} scored "
        f"({task.scored_on}.jsonl{left_out}){majority}\n{balance}"
        f"{recipe.epochs} epochs of {recipe.batch_size}, learning rate {recipe.learning_rate:g}; {stop}"
    )
