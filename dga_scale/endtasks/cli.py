"""The commands ``dga-finetune`` and ``dga-forgetting``; launchers/ and tools/ call the same functions."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.arguments import Parser
from dga_scale.endtasks.datasets_tasks import exported
from dga_scale.endtasks.metrics import CLASSIFICATION, REGRESSION
from dga_scale.endtasks.recipes import LIMITS, OVERRIDES, Recipe, load_with_recipe
from dga_scale.endtasks.tasks import Task, class_shares, majority_share, split_folder
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries


def finetune_command() -> NoReturn:
    """Entry point of ``dga-finetune``."""
    run_main(finetune)


def forgetting_command() -> NoReturn:
    """Entry point of ``dga-forgetting``."""
    run_main(forgetting)


def finetune(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune a model on an end task with several seeds, and print mean and standard deviation."""
    parser = Parser(
        prog="dga-finetune",
        description="Fine-tune a model on an end task with several seeds. A stopped command resumes.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run's model/ folder, or any pretrained model")
    add(
        "--task",
        required=True,
        metavar="DIR",
        help="folder with train.jsonl, test.jsonl and perhaps dev.jsonl; or a folder or name (NAME:CONFIG) "
        "that `datasets` reads, which is written out to OUTPUT_DIR/task first",
    )
    add(
        "--split",
        choices=("official", "dga"),
        help="of a task with two folders, TASK and TASK_dga_split (the papers' partition): which; default: "
        "the folder as given",
    )
    add(
        "--output_dir", required=True, type=Path, metavar="DIR", help="seed-1.json, ..., summary.json go here"
    )
    _add_shared(parser)
    options = parser.parse_args(arguments)
    quiet_libraries()
    folder = options.task if options.split is None else split_folder(options.task, options.split)
    task, recipe = _task(exported(folder, options.output_dir / "task"), options)
    print(_describe(task, recipe))
    from dga_scale.endtasks.seeds import run_seeds

    summary = run_seeds(options.model, task, recipe, _seeds(options), options.output_dir, jobs=options.jobs)
    names = [recipe.metric, *(name for name in summary["scores"] if name != recipe.metric)]
    for name in names:
        print(f"{name:>10}: {_spread(summary['scores'][name])}")
    print(f"results: {options.output_dir / 'summary.json'}")
    return 0


def forgetting(arguments: Sequence[str] | None = None) -> int:
    """Measure the forgetting of a run over several domains; print the scores after every stage."""
    parser = Parser(
        prog="dga-forgetting",
        description="What a sequence of domains (RUN/1-restaurant, RUN/2-acl, ...) forgot: after every "
        "stage, the end tasks of the domains seen so far. A stopped command resumes.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run over several domains")
    parser.add_argument(
        "--task", required=True, nargs="+", metavar="DOMAIN=DIR", help="end task of each domain", dest="tasks"
    )
    _add_shared(parser)
    options = parser.parse_args(arguments)
    quiet_libraries()
    tasks = {}
    for text in options.tasks:
        domain, equals, folder = text.partition("=")
        if not (domain and equals and folder):
            raise UserError(f"--task {text}: write DOMAIN=DIR, for example acl=endtasks/aclarc.")
        tasks[domain] = _task(folder, options)
    from rich.console import Console
    from rich.table import Table

    from dga_scale.endtasks.forgetting import measure_forgetting
    from dga_scale.logging.plots import forgetting_figure, save_png

    result = measure_forgetting(options.run, tasks, _seeds(options), jobs=options.jobs)
    domains = result["domains"]
    table = Table(title=f"end-task score, {options.seeds} seeds")
    table.add_column("after")
    for domain, metric in zip(domains, result["metrics"], strict=True):
        table.add_column(f"{domain}\n{metric}", justify="right")
    for domain, row in zip(domains, result["scores"], strict=True):
        table.add_row(domain, *(_spread(score) for score in row))
    Console().print(table)
    rate = result["forgetting_rate"]
    kind = "lost" if rate["mean"] > 0 else "gained"
    print(f"forgetting rate: {_spread(rate)} (earlier domains {kind} that much by the end)")
    means = [[score["mean"] for score in row] for row in result["scores"]]
    save_png(forgetting_figure(domains, means), options.run / "forgetting.png")
    print(f"results: {options.run / 'forgetting.json'}, {options.run / 'forgetting.png'}")
    return 0


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seeds", type=int, default=3, metavar="N", help="runs, with seeds 1 to N; default: 3")
    add("--jobs", type=int, default=1, metavar="N", help="seeds at a time, each a process; default: 1")
    add("--max_train_examples", type=int, metavar="N", help="train on N examples; default: all")
    add("--max_dev_examples", type=int, metavar="N", help="choose the epoch by N examples; default: all")
    add("--max_test_examples", type=int, metavar="N", help="score N examples; default: all")
    defaults = {f.name: f for f in dataclasses.fields(Recipe)}
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


def _task(folder: str, options: argparse.Namespace) -> tuple[Task, Recipe]:
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1.")
    names = (*OVERRIDES, *LIMITS)
    return load_with_recipe(folder, {n: value for n in names if (value := getattr(options, n)) is not None})


def _seeds(options: argparse.Namespace) -> list[int]:
    return list(range(1, options.seeds + 1))


def _describe(task: Task, recipe: Recipe) -> str:
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


def _spread(score: dict[str, Any]) -> str:
    return f"{score['mean']:.4f}" + ("" if score["std"] is None else f" ± {score['std']:.4f}")
