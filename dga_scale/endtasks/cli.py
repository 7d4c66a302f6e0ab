"""The commands ``dga-finetune`` and ``dga-forgetting``; launchers/ and tools/ call the same functions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dga_scale.config.arguments import Parser, PathText
from dga_scale.endtasks.datasets_tasks import exported
from dga_scale.endtasks.options import add_options, load_task_of, seeds_of
from dga_scale.endtasks.recipes import describe
from dga_scale.endtasks.tasks import split_folder
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.storage.lock import owned


def finetune_command() -> NoReturn:
    """Entry point of ``dga-finetune``."""
    run_main(finetune)


def forgetting_command() -> NoReturn:
    """Entry point of ``dga-forgetting``."""
    run_main(forgetting)


def finetune(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune a model on an end task with several seeds, and print mean and standard deviation."""
    quiet_libraries()
    parser = Parser(
        prog="dga-finetune",
        description="Fine-tune a model on an end task with several seeds. A stopped command resumes.",
    )
    add = parser.add_argument
    add("--model", required=True, type=PathText, metavar="DIR",
        help="a run's model/ folder, or any pretrained model")  # fmt: skip
    add("--task", required=True, type=PathText, metavar="DIR",
        help="folder with train.jsonl, test.jsonl and perhaps dev.jsonl; or a folder or name (NAME:CONFIG) "
        "that `datasets` reads, which is written out to OUTPUT_DIR/task first")  # fmt: skip
    add("--split", choices=("official", "dga"),
        help="of a task with two folders, TASK and TASK_dga_split (the papers' partition): which; default: "
        "the folder as given")  # fmt: skip
    add("--output_dir", required=True, type=Path, metavar="DIR",
        help="seed-1.json, seed-1.predictions.jsonl, ..., summary.json go here")  # fmt: skip
    add_options(parser)
    return parser.run(_finetune, arguments)


def _finetune(options: argparse.Namespace) -> int:
    folder = options.task if options.split is None else split_folder(options.task, options.split)
    with owned(options.output_dir):
        task, recipe = load_task_of(exported(folder, options.output_dir / "task"), options)
        from dga_scale.backbone.loading import check_vocabulary, load_model_config
        from dga_scale.corpus.tokenizer import load_tokenizer
        from dga_scale.endtasks.seeds import run_seeds, spread_text

        check_vocabulary(load_model_config(options.model), load_tokenizer(options.model))
        print(describe(task, recipe))
        seeds = seeds_of(options)
        summary = run_seeds(options.model, task, recipe, seeds, options.output_dir, jobs=options.jobs)
    names = [recipe.metric, *(name for name in summary["scores"] if name != recipe.metric)]
    for name in names:
        print(f"{name:>10}: {spread_text(summary['scores'][name])}")
    print(f"results: {options.output_dir / 'summary.json'}")
    return 0


def forgetting(arguments: Sequence[str] | None = None) -> int:
    """Measure the forgetting of a run over several domains; print the scores after every stage."""
    quiet_libraries()
    parser = Parser(
        prog="dga-forgetting",
        description="What a sequence of domains (RUN/1-restaurant, RUN/2-acl, ...) forgot: after every "
        "stage, the end tasks of the domains seen so far. A stopped command resumes.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of the run over several domains")
    add("--task", required=True, nargs="+", type=PathText, metavar="DOMAIN=DIR", dest="tasks",
        help="end task of each domain")  # fmt: skip
    add_options(parser)
    return parser.run(_forgetting, arguments)


def _forgetting(options: argparse.Namespace) -> int:
    tasks = {}
    for text in options.tasks:
        domain, equals, folder = text.partition("=")
        if not (domain and equals and folder):
            raise UserError(f"--task {text}: write DOMAIN=DIR, for example acl=endtasks/aclarc.")
        tasks[domain] = load_task_of(folder, options)
    from dga_scale.endtasks.forgetting import SCORES, find_stages, measure_forgetting, print_forgetting

    find_stages(options.run)  # before a folder is made in it
    # That above is not locked: later domains may still be trained there.
    with owned(options.run / SCORES):
        result = measure_forgetting(options.run, tasks, seeds_of(options), jobs=options.jobs)
        print_forgetting(result, options.run, options.seeds)
    return 0
