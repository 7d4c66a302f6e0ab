"""What is compared: a YAML file, read and checked before anything runs."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from dga_scale.config.arguments import nearest
from dga_scale.config.parsing import read_config
from dga_scale.endtasks.evaluate import BASE
from dga_scale.endtasks.suite import read_recipe
from dga_scale.endtasks.yaml_file import Lines, read_yaml
from dga_scale.errors import UserError

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Domain:
    """Text to adapt to, and the end task that shows what it gave."""

    text: tuple[str, ...]
    """As tools/shard_corpus.py takes it."""
    task: str
    """Folder of the end task."""


@dataclass(frozen=True)
class General:
    """What must not be forgotten."""

    text: tuple[str, ...]
    """For replay and the Fisher ("{general}" in a method's flags); its held-out part is scored ..."""
    held_out: tuple[str, ...] = ()
    """... unless there is other text for that."""
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """How models are scored: the keys of a suite."""

    seeds: int = 3
    jobs: int = 1
    max_eval_rows: int = 2000
    batch_size: int = 16
    recipe: Flags = field(default_factory=dict)
    task_recipes: Mapping[str, Flags] = field(default_factory=dict)


@dataclass(frozen=True)
class DomainSequence:
    """Domains trained on one after the other, and the methods that do so."""

    domains: tuple[str, ...]
    methods: Mapping[str, Flags]
    """By the name in the tables: flags of training."""


@dataclass(frozen=True)
class Plan:
    """The machines that ``--plan`` counts hours of."""

    gpus: int
    gpu: str
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Settings:
    """The YAML's keys."""

    model: str
    domains: Mapping[str, Domain]
    general: General
    methods: Mapping[str, Flags]
    """By the name in the tables: flags of training, or ``merge: METHOD`` with flags of merging. "{general}"
    and "{general_held_out}" in them are the corpora of general text."""
    training: Flags
    """Flags of every training."""
    launcher: tuple[str, ...] = ("deepspeed",)
    """What launches launchers/dga_train.py."""
    ds_config: str = "ds_configs/zero2.json"
    sharding: Flags = field(default_factory=dict)
    """Flags of tools/shard_corpus.py."""
    seeds: tuple[int, ...] = (42,)
    """Of training: each method is trained with each."""
    compare_with: str | None = None
    """A method that all others are compared with, besides the base."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    sequence: DomainSequence | None = None
    plan: Plan | None = None

    def train_flags(self, flags: Flags) -> dict[str, Any]:
        """Flags of a training: the shared ones and a method's, which go before."""
        return {**self.training, **flags}

    def trained(self) -> dict[str, Flags]:
        """The methods that train a model for each domain."""
        return {name: flags for name, flags in self.methods.items() if "merge" not in flags}


def load_settings(path: Path, data: str) -> Settings:
    """Read and check the YAML; ``data`` takes the place of ``{data}`` in it.

    Raises:
        UserError: an unknown key or flag (with the nearest known one), a value of another kind, a name of a
            method or domain that is none; with the line.

    """
    content, lines = read_yaml(path, "the YAML")
    reader = _Reader(path, lines)
    settings: Settings = reader.read(Settings, _filled(content, data), ())
    reader.check(settings)
    return settings


def as_flags(flags: Flags) -> list[str]:
    """``{max_steps: 40}`` as ``--max_steps 40``; lists as several values, true as YAML's "true"."""
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, bool) else str(v) for v in values)]
    return words


def label(method: str) -> str:
    """A method's name as folders and tools/evaluate.py take it."""
    return re.sub(r"[^\w.+-]+", "-", method).strip("-")


def _filled(content: Any, data: str) -> Any:
    if isinstance(content, dict):
        return {key: _filled(value, data) for key, value in content.items()}
    if isinstance(content, list):
        return [_filled(value, data) for value in content]
    return content.replace("{data}", data) if isinstance(content, str) else content


class _Reader:
    """Content by the types of the dataclasses' fields; mistakes with their lines."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines

    def fail(self, at: tuple[Any, ...], message: str) -> UserError:
        return UserError(f"{self.path}:{self.lines.get(at, 1)}: {message}")

    def read(self, kind: Any, content: Any, at: tuple[Any, ...]) -> Any:
        """A mapping as a dataclass."""
        known = {f.name: f for f in dataclasses.fields(kind)}
        name = ".".join(map(str, at)) or "the file"
        if not isinstance(content, dict):
            raise self.fail(
                at, f"{name} must hold keys such as {next(iter(known))}, not {json.dumps(content)}."
            )
        for key in content:
            if key not in known:
                raise self.fail((*at, key), f"unknown key {key!r}.{nearest(str(key), known)}")
        for key, each in known.items():
            needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
            if needed and key not in content:
                raise self.fail(at, f"{name} lacks {key!r}.")
        return kind(**{key: self.value(known[key].type, value, (*at, key)) for key, value in content.items()})

    def value(self, kind: Any, value: Any, at: tuple[Any, ...]) -> Any:
        """A value as a field's type."""
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            return self.read(kind, value, at)
        if at[-1] == "recipe" or "task_recipes" in at[:-1]:
            return read_recipe(value, f"{self.path}:{self.lines[at]}")
        if get_origin(kind) is Mapping:
            if not isinstance(value, dict):
                raise self.fail(at, f"{at[-1]} must hold `name: value` lines, not {json.dumps(value)}.")
            inner = get_args(kind)[1]
            return {k: v if inner is Any else self.value(inner, v, (*at, k)) for k, v in value.items()}
        if get_origin(kind) is tuple:
            values = value if isinstance(value, list) else [value]
            return tuple(self.value(get_args(kind)[0], each, at) for each in values)
        if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < 1):
            words = "a whole number above 0" if kind is int else "a text"
            raise self.fail(at, f"{at[-1]} must be {words}, not {json.dumps(value)}.")
        return value

    def check(self, settings: Settings) -> None:
        """Names that refer to each other, and every flag of training by training's own parser."""
        trained = settings.trained()
        for name, flags in settings.methods.items():
            others = [label(other) for other in settings.methods if other != name]
            if label(name) in (BASE, "", *others):
                raise self.fail(
                    ("methods", name),
                    f"{name}: give it a name that is told apart from others as a folder too.",
                )
            if name in trained:
                self.check_flags(settings, flags, ("methods", name))
            elif flags["merge"] not in trained:
                raise self.fail(
                    ("methods", name, "merge"),
                    f"no trained method is called {flags['merge']!r}.{nearest(str(flags['merge']), trained)}",
                )
        chosen: list[tuple[tuple[str, ...], str, Mapping[str, Any]]] = []
        if settings.compare_with:
            chosen.append((("compare_with",), settings.compare_with, settings.methods))
        if settings.sequence:
            chosen += [
                (("sequence", "domains"), name, settings.domains) for name in settings.sequence.domains
            ]
            for name, flags in settings.sequence.methods.items():
                self.check_flags(settings, flags, ("sequence", "methods", name))
        for at, name, known in chosen:
            if name not in known:
                raise self.fail(at, f"{'.'.join(at)}: {name!r} is none of the file's.{nearest(name, known)}")
        tasks = [Path(domain.task).name for domain in settings.domains.values()]
        tasks += [Path(task).name for task in settings.general.tasks]
        for task in settings.evaluation.task_recipes:
            if task not in tasks:
                raise self.fail(
                    ("evaluation", "task_recipes", task),
                    f"task_recipes: there is no task {task!r}.{nearest(task, tasks)}",
                )
            in_sequence = settings.sequence.domains if settings.sequence else ()
            if task in [Path(settings.domains[domain].task).name for domain in in_sequence]:
                message = f"task_recipes: {task} is a task of the sequence, whose tasks have `recipe` alone."
                raise self.fail(("evaluation", "task_recipes", task), message)

    def check_flags(self, settings: Settings, flags: Flags, at: tuple[str, ...]) -> None:
        words = ["--model", settings.model, "--corpus", "any", "--ds_config", settings.ds_config]
        try:
            read_config([*words, *as_flags(settings.train_flags(flags))])
        except UserError as error:
            raise self.fail(at, f"{at[-1]}: {error}") from None
