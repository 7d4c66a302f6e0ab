"""What is compared: a YAML file, read and checked before anything runs."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from dga_scale.config.arguments import nearest
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig
from dga_scale.config.yaml_file import Lines, read_yaml
from dga_scale.endtasks.suite import BASE, CORPORA, TASKS, Suite, read_recipe
from dga_scale.errors import UserError

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Domain:
    """The text to adapt to, and the end task that shows what it gave."""

    text: tuple[str, ...]
    """The input of tools/shard_corpus.py."""
    task: str = ""
    """The folder of the end task; none: losses alone are compared."""


@dataclass(frozen=True)
class General:
    """The text and the tasks that must not be forgotten."""

    text: tuple[str, ...]
    """The text for replay and the Fisher ("{general}" in a method's flags)."""
    held_out: tuple[str, ...] = ()
    """The text that losses are measured on; none: the held-out part of ``text``."""
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class DomainSequence:
    """The domains that are trained on one after the other, and the methods that do so."""

    domains: tuple[str, ...]
    methods: Mapping[str, Flags]
    """The flags of training, by the method's name in the tables."""


@dataclass(frozen=True)
class Plan:
    """The machines that ``--plan`` counts hours of."""

    gpus: int
    gpu: str
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Settings:
    """The keys of the YAML."""

    model: str
    domains: Mapping[str, Domain]
    general: General
    methods: Mapping[str, Flags]
    """The flags of training, or ``merge: METHOD`` with flags of merging, by the method's name in the tables.
    "{general}" and "{general_held_out}" in them are the corpora of general text."""
    training: Flags
    """The flags of every training."""
    launcher: tuple[str, ...] = ("deepspeed",)
    """The command that launches launchers/dga_train.py."""
    ds_config: str = "ds_configs/zero2.json"
    sharding: Flags = field(default_factory=dict)
    """The flags of tools/shard_corpus.py."""
    seeds: tuple[int, ...] = (42,)
    """The seeds of training; each method is trained with each."""
    compare_with: str | None = None
    """The method that all others are compared with, besides the base."""
    evaluation: Suite = field(default_factory=Suite)
    """The suite that models are scored by, whose text and tasks are those of ``domains`` and ``general``."""
    sequence: DomainSequence | None = None
    plan: Plan | None = None

    def config(self, flags: Flags) -> TrainConfig:
        """Read the settings of a training by ``training`` and a method's flags, which go before.

        Raises:
            UserError: a flag that training refuses.
        """
        words = ["--model", self.model, "--corpus", "any", "--ds_config", self.ds_config]
        return read_config([*words, *as_flags({**self.training, **flags})])

    def tasks(self) -> list[str]:
        """Return the folders of all end tasks."""
        return [*filter(None, (domain.task for domain in self.domains.values())), *self.general.tasks]

    def trained(self) -> dict[str, Flags]:
        """Return the methods that train a model for each domain."""
        return {name: flags for name, flags in self.methods.items() if "merge" not in flags}


def load_settings(path: Path, data: str) -> Settings:
    """Read and check the YAML; ``data`` takes the place of ``{data}`` in it.

    Raises:
        UserError: an unknown key or flag (with the nearest known one), a value of another kind, a name of a
            method or domain that is none; with the line.

    """
    content, lines = read_yaml(path)
    content = json.loads(json.dumps(content, default=str).replace("{data}", json.dumps(data)[1:-1]))
    reader = _Reader(path, lines)
    settings: Settings = reader.read(Settings, content, ())
    reader.check(settings)
    return settings


def as_flags(flags: Flags) -> list[str]:
    """Write ``{max_steps: 40}`` as ``--max_steps 40``; lists as several values, true as YAML's "true"."""
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, bool) else str(v) for v in values)]
    return words


def label(method: str) -> str:
    """Return a method's name as folders and tools/evaluate.py take it."""
    return re.sub(r"[^\w.+-]+", "-", method).strip("-")


class _Reader:
    """Reads content by the types of the dataclasses' fields; a mistake is named with its line."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines

    def fail(self, at: tuple[Any, ...], message: str) -> UserError:
        return UserError(f"{self.path}:{self.lines.get(at, 1)}: {'.'.join(at) or 'the file'}{message}")

    def read(self, kind: Any, value: Any, at: tuple[str, ...]) -> Any:
        """Return a value as a field's type has it."""
        inner = get_args(kind)
        if type(None) in inner:
            return self.read(inner[0], value, at)
        if at[-1:] == ("recipe",) or "task_recipes" in at[:-1]:
            return read_recipe(value, f"{self.path}:{self.lines.get(at, 1)}")
        if get_origin(kind) is tuple:
            values = value if isinstance(value, list) else [value]
            return tuple(self.read(inner[0], each, at) for each in values)
        if get_origin(kind) is Mapping or dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise self.fail(at, f" must hold `name: value` lines, not {json.dumps(value)}.")
            if get_origin(kind) is Mapping:
                return {key: self.read(inner[1], each, (*at, key)) for key, each in value.items()}
            return self.read_fields(kind, value, at)
        if kind is Any or (isinstance(value, kind) and (kind is str or value > 0) and value is not True):
            return value
        words = "a whole number above 0" if kind is int else "a text"
        raise self.fail(at, f" must be {words}, not {json.dumps(value)}.")

    def read_fields(self, kind: Any, content: dict[str, Any], at: tuple[str, ...]) -> Any:
        """Return a mapping as a dataclass."""
        known = {each.name: each for each in dataclasses.fields(kind)}
        for key in content:
            if key not in known:
                raise self.fail((*at, key), f": unknown key.{nearest(key, known)}")
        for key, each in known.items():
            needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
            if needed and key not in content:
                raise self.fail(at, f" lacks {key!r}.")
        return kind(**{key: self.read(known[key].type, each, (*at, key)) for key, each in content.items()})

    def check(self, settings: Settings) -> None:
        """Check names that refer to each other, and every flag of training by training's own parser."""
        trained, methods, domains = settings.trained(), settings.methods, settings.domains
        for name, flags in methods.items():
            if label(name) in (BASE, "", *(label(other) for other in methods if other != name)):
                raise self.fail(
                    ("methods", name), ": give it a name that is told apart from others as a folder too."
                )
            if name in trained:
                self.check_flags(settings, flags, ("methods", name))
            else:
                self.check_name(flags["merge"], trained, ("methods", name, "merge"))
        if settings.compare_with:
            self.check_name(settings.compare_with, methods, ("compare_with",))
        for key in (*CORPORA, *TASKS):
            if getattr(settings.evaluation, key):
                raise self.fail(("evaluation", key), ": `domains` and `general` name the text and the tasks.")
        tasks = [Path(task).name for task in settings.tasks()]
        for task in settings.evaluation.task_recipes:
            self.check_name(task, tasks, ("evaluation", "task_recipes", task))
        if settings.sequence:
            for domain in settings.sequence.domains:
                self.check_name(domain, domains, ("sequence", "domains"))
                if not domains[domain].task:
                    raise self.fail(("domains", domain), " is in the sequence and lacks 'task'.")
                task = Path(domains[domain].task).name
                if task in settings.evaluation.task_recipes:
                    at = ("evaluation", "task_recipes", task)
                    raise self.fail(at, " is a task of the sequence, whose tasks have `recipe` alone.")
            for name, flags in settings.sequence.methods.items():
                self.check_flags(settings, flags, ("sequence", "methods", name))

    def check_name(self, name: str, known: Iterable[str], at: tuple[str, ...]) -> None:
        if name not in known:
            raise self.fail(at, f": {name!r} is none of {', '.join(known)}.{nearest(name, known)}")

    def check_flags(self, settings: Settings, flags: Flags, at: tuple[str, ...]) -> None:
        try:
            settings.config(flags)
        except UserError as error:
            raise self.fail(at, f": {error}") from None
