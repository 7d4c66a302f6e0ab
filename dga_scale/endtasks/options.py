"""The options that ``dga-finetune`` and ``dga-forgetting`` have alike."""

import argparse
import dataclasses
from typing import Any

from dga_scale.config.arguments import Count, Parser
from dga_scale.endtasks.metrics import CLASSIFICATION, REGRESSION
from dga_scale.endtasks.recipes import LIMITS, OVERRIDES, Recipe, load_with_recipe
from dga_scale.endtasks.tasks import Task


def add_options(parser: Parser) -> None:
    """Add the options for seeds, jobs, limits on the examples, and the recipe."""
    add = parser.add_argument
    add("--seeds", action=Count, default=3, metavar="N", help="runs, with seeds 1 to N; default: 3")
    add("--jobs", action=Count, default=1, metavar="N", help="seeds at a time, each a process; default: 1")
    add("--max_train_examples", type=int, metavar="N", help="train on N examples; default: all")
    add("--max_dev_examples", type=int, metavar="N", help="choose the epoch by N examples; default: all")
    add("--max_test_examples", type=int, metavar="N", help="score N examples; default: all")
    defaults = {f.name: f for f in dataclasses.fields(Recipe)}
    parser.add_import()
    choices: dict[str, Any] = {"metric": (*CLASSIFICATION, *REGRESSION), "precision": ("bf16", "fp32")}
    for name in OVERRIDES:
        kind: Any = type(defaults[name].default)
        shown = None if name in choices else name.upper()
        add(
            f"--{name}",
            type=kind,
            choices=choices.get(name),
            metavar=shown,
            help="default: the task's recipe",
        )


def load_task_of(folder: str, options: argparse.Namespace) -> tuple[Task, Recipe]:
    """Load a task and its recipe, as the options change them.

    Raises:
        UserError: As ``load_with_recipe``.
    """
    names = (*OVERRIDES, *LIMITS)
    return load_with_recipe(folder, {n: value for n in names if (value := getattr(options, n)) is not None})


def seeds_of(options: argparse.Namespace) -> list[int]:
    """Return the seeds that the options ask for."""
    return list(range(1, options.seeds + 1))
