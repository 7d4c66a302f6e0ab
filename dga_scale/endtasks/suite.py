"""Read and check a suite: a YAML file of the corpora, tasks and settings of an evaluation.

Paths in it are relative to the current folder, like those of every command.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dga_scale.config.arguments import nearest
from dga_scale.config.declaration import is_text, shown
from dga_scale.config.yaml_file import Lines, read_yaml
from dga_scale.corpus.shards import VALIDATION
from dga_scale.endtasks.recipes import LIMITS, OVERRIDES, Recipe, load_with_recipe
from dga_scale.endtasks.tasks import Task
from dga_scale.errors import GivenPath, UserError

CORPORA = ("domain_corpora", "general_corpora")
TASKS = ("domain_tasks", "general_tasks")
RECIPE_KEYS = (*OVERRIDES, *LIMITS)
BASE = "base"
"""The label of the model that all others are compared with."""


@dataclass(frozen=True)
class Suite:
    """Held-out text and end tasks, and how they are scored; the fields are named as in the YAML file."""

    domain_corpora: tuple[str, ...] = ()
    """The corpus folders of the domain, whose held-out split is scored."""
    general_corpora: tuple[str, ...] = ()
    domain_tasks: tuple[str, ...] = ()
    """The end-task folders of the domain."""
    general_tasks: tuple[str, ...] = ()
    unlabelled_text: tuple[str, ...] = ()
    """The raw text that the models were trained on, in which examples of the end tasks are counted."""
    text_field: str = "text"
    """The field of the unlabelled text that holds a document."""
    seeds: int = 3
    """The number N of fine-tunings of each model on each task, with seeds 1 to N."""
    jobs: int = 1
    """The number of fine-tunings at a time."""
    max_eval_rows: int = 2000
    """The number of rows of each corpus, a fixed sample."""
    batch_size: int = 16
    """The number of rows of text in one forward pass."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The fine-tuning settings that override each task's own, and max_train_examples and the like."""
    task_recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The fine-tuning settings of single tasks, by their folders' names; they override ``recipe``."""

    def corpora(self) -> Iterator[tuple[str, str, str]]:
        """Yield kind ("domain" or "general"), name and folder of each corpus."""
        for key in CORPORA:
            for folder in getattr(self, key):
                yield key.split("_")[0], corpus_name(folder), folder

    def given_paths(self, file: Path) -> list[GivenPath]:
        """List the paths that the suite names, with the file and the key."""
        return [
            GivenPath(f"{file}: {key}:", path, path)
            for key in (*CORPORA, *TASKS, "unlabelled_text")
            for path in getattr(self, key)
        ]

    def load_tasks(self) -> list[tuple[str, Task, Recipe]]:
        """Load kind, task and recipe of each end task.

        Raises:
            UserError: As ``load_task``; or a recipe does not suit its task.
        """
        found = []
        for key in TASKS:
            for folder in getattr(self, key):
                overrides = {**self.recipe, **self.task_recipes.get(Path(folder).resolve().name, {})}
                found.append((key.split("_")[0], *load_with_recipe(folder, overrides)))
        return found


def corpus_name(folder: str) -> str:
    """Return the name of a corpus: its folder's, also for its held-out split."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == VALIDATION else path.name


def load_suite(path: Path, exists: Callable[[str], bool] = os.path.isdir) -> Suite:
    """Read and check a suite.

    Args:
        path: The YAML file.
        exists: Tells whether a folder that it names exists; for jobs in a queue, whether it will exist.

    Raises:
        UserError: The file is not YAML, has an unknown key (with the nearest known one) or a value of
            another type, names a folder that does not exist or two of one name, or names nothing to evaluate.
    """
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError("it names nothing to evaluate. Write `domain_corpora: [FOLDER]`, say.", path)
    known = {f.name: f for f in dataclasses.fields(Suite)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        where = f"{path}:{lines[key,]}"
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")
        if value is None:
            continue
        if key == "recipe":
            values[key] = read_recipe(value, where)
        elif key == "task_recipes":
            values[key] = _task_recipes(value, path, lines)
        elif str(known[key].type).startswith("tuple"):
            folders = value if isinstance(value, list) else [value]
            positions = [f"{path}:{lines.get((key, number), lines[key,])}" for number in range(len(folders))]
            values[key] = _folders(key, folders, positions, exists)
        elif isinstance(value, bool) or not isinstance(value, type(known[key].default)):
            kind = "a whole number" if known[key].default != "text" else "text"
            raise UserError(f"{where}: {key} must be {kind}, not {shown(value)}.")
        elif isinstance(value, int) and not 1 <= value < 2**31:
            words = "at least 1" if value < 1 else f"below {2**31}"
            raise UserError(f"{where}: {key} {shown(value)}: must be {words}.")
        elif value == "" or (isinstance(value, str) and not is_text(value)):
            raise UserError(f"{where}: {key} {shown(value)}: must be text that is not empty.")
        else:
            values[key] = value
    suite = Suite(**values)
    if not any(getattr(suite, key) for key in (*CORPORA, *TASKS)):
        raise UserError(f"it names nothing to evaluate: none of {', '.join((*CORPORA, *TASKS))}.", path)
    _check_names(path, [corpus_name(folder) for _, _, folder in suite.corpora()])
    tasks = [Path(folder).resolve().name for key in TASKS for folder in getattr(suite, key)]
    _check_names(path, tasks)
    for name in suite.task_recipes:
        if name not in tasks:
            where = f"{path}:{lines['task_recipes', name]}"
            raise UserError(f"{where}: task_recipes: the suite has no task {name!r}.{nearest(name, tasks)}")
    return suite


def _folders(
    key: str, folders: list[Any], positions: list[str], exists: Callable[[str], bool]
) -> tuple[str, ...]:
    for where, folder in zip(positions, folders, strict=True):
        if not isinstance(folder, str) or not folder or not is_text(folder):
            raise UserError(f"{where}: {key} must be a list of paths, not {shown(folder)}.")
        if key in (*CORPORA, *TASKS) and not exists(folder):
            raise UserError(
                f"{where}: {key}: {folder}: no such folder. Paths are relative to the current folder, "
                f"{Path.cwd()}."
            )
    return tuple(folders)


def _task_recipes(value: Any, path: Path, lines: Lines) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}:{lines['task_recipes',]}: task_recipes must hold a recipe by task, such as `chemprot: "
            f"{{epochs: 3}}`, not {shown(value)}."
        )
    return {
        str(task): read_recipe(recipe, f"{path}:{lines['task_recipes', task]}")
        for task, recipe in value.items()
    }


def read_recipe(value: Any, where: str) -> dict[str, Any]:
    """Check fine-tuning settings; ``where`` names their file and line.

    Raises:
        UserError: A setting is unknown (the nearest known one is named), or its value has another type.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: recipe must hold settings, such as `epochs: 3`, not {shown(value)}.")
    kinds: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Recipe)}
    kinds |= dict.fromkeys(LIMITS, int)
    found: dict[str, Any] = {}
    for name, setting in value.items():
        if name not in RECIPE_KEYS:
            raise UserError(
                f"{where}: recipe has an unknown setting {name!r}.{nearest(str(name), RECIPE_KEYS)}"
            )
        try:
            found[name] = kinds[name](setting)  # YAML takes 3e-5 for a text
        except (TypeError, ValueError, OverflowError):
            found[name] = None
        if (
            isinstance(setting, bool)
            or found[name] is None
            or (kinds[name] is int and found[name] != setting)
        ):
            words = {int: "a whole number", float: "a number", str: "text"}[kinds[name]]
            raise UserError(f"{where}: recipe: {name} must be {words}, not {shown(setting)}.")
    return found


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two folders are called {name}; results go by that name.", path)
