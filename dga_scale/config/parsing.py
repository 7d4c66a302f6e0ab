"""Settings of a training run from its flags and its YAML file; unknown names are refused. Flags win."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from transformers import HfArgumentParser

from dga_scale.config.arguments import nearest
from dga_scale.config.settings import (
    GROUPS,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    TrainConfig,
)
from dga_scale.errors import UserError


class MethodEntry(NamedTuple):
    """A method as the command line knows it."""

    summary: str
    settings: type[MethodSettings]


Methods = Mapping[str, MethodEntry]
"""By the name that ``--method`` takes."""

DEFAULT_METHOD = "dga"


def _names(settings: type[Any]) -> list[str]:
    return [f.name for f in fields(settings)]


def known_settings(methods: Methods) -> dict[str, bool]:
    """Every setting there is, of all methods, and whether it takes a list."""
    groups: list[type[Any]] = [ModelSettings, DataSettings, OptimizationSettings, RunSettings]
    groups += [entry.settings for entry in methods.values()]
    return {"method": False} | {f.name: "list" in str(f.type) for group in groups for f in fields(group)}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each setting; the list of methods as it stands."""


class _Parser(HfArgumentParser):
    """Errors as ours: one line, the nearest right name, no usage text of 80 lines before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def build_parser(methods: Methods, method: str, prog: str = "dga-train") -> HfArgumentParser:
    """The parser of all settings of a run with one method, with a section in ``--help`` for each group."""
    settings = methods[method].settings
    groups: list[Any] = [ModelSettings, DataSettings, settings, OptimizationSettings, RunSettings]
    parser = _Parser(
        groups,
        prog=prog,
        usage=f"{prog} --ds_config FILE.json --model MODEL --corpus FOLDER [--method NAME] [settings]",
        description="Adapt a pretrained language model to a domain and keep what it knows.",
        epilog=_other_methods(methods, method),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Settings as YAML, by the names below. Flags win."
    )
    parser.add_argument(
        "--method", default=DEFAULT_METHOD, choices=list(methods), help="What is learnt; see below."
    )
    return parser


def _other_methods(methods: Methods, chosen: str) -> str:
    """What ``--help`` says below the settings: each method, and its own settings under its name."""
    parts = []
    for name, entry in methods.items():
        settings: Any = entry.settings
        own = _Parser([settings], usage=argparse.SUPPRESS, add_help=False).format_help()
        head = f"--method {name}{' (chosen)' if name == chosen else ''}: {entry.summary}"
        lines = own.splitlines()[1:] if name != chosen else ["  its settings are among those above"]
        parts.append("\n".join([head, *(line for line in lines if line.strip())]))
    return "methods:\n\n" + "\n\n".join(parts)


def parse_config(methods: Methods, arguments: Sequence[str] | None = None) -> TrainConfig:
    """Settings from command-line arguments and the YAML file they name.

    Raises:
        UserError: unknown name (with the nearest right one), a setting of another method, a value of the
            wrong type or out of range, a YAML file that is missing or not a mapping.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = known_settings(methods)
    for argument in arguments:
        name = _name(argument)
        if argument.startswith("--") and name not in {*known, "config", "help"}:
            raise UserError(f"unknown setting --{name}.{nearest(name, known)} See --help.")
    from_file = _yaml_arguments(_value_of("config", arguments), known)
    given = [*from_file, *arguments]
    method = _value_of("method", arguments) or _value_of("method", from_file) or DEFAULT_METHOD
    if method not in methods:
        raise UserError(f"--method {method}: there is {', '.join(methods)}.{nearest(method, methods)}")
    explicit = {_name(a) for a in given if a.startswith("--")}
    _refuse_settings_of_others(methods, method, explicit)
    parser = build_parser(methods, method)
    model, data, own, optimization, run, _, unknown = parser.parse_args_into_dataclasses(
        given, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no setting. Write --name value. See --help.")
    chosen = frozenset(explicit & set(known))
    config = TrainConfig(model, data, method, own, optimization, run, chosen)
    _check_values(config)
    return config


def _refuse_settings_of_others(methods: Methods, method: str, explicit: Iterable[str]) -> None:
    own = _names(methods[method].settings)
    of_methods = {name for entry in methods.values() for name in _names(entry.settings)}
    for name in sorted(set(explicit) & of_methods - set(own)):
        owners = [other for other, entry in methods.items() if name in _names(entry.settings)]
        raise UserError(
            f"--{name} is a setting of --method {', '.join(owners)}; this run's is {method}, which does not "
            f"read it. Leave it out, or choose another method."
        )


def _name(argument: str) -> str:
    """``--max-steps=3`` -> ``max_steps``: dashes and underscores mean the same."""
    return argument.split("=", 1)[0].removeprefix("--").replace("-", "_")


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    value = None
    for index, argument in enumerate(arguments):
        if argument.startswith("--") and _name(argument) == name:
            if "=" in argument:
                value = argument.split("=", 1)[1]
            elif index + 1 < len(arguments):
                value = arguments[index + 1]
    return value


def _yaml_arguments(path: str | None, known: Mapping[str, bool]) -> list[str]:
    """The YAML file's settings as command-line arguments, so that one parser converts and checks both."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no settings. Write one `name: value` a line.")
    arguments = []
    for name, value in content.items():
        if name not in known:
            raise UserError(f"{path}: unknown setting {name!r}.{nearest(str(name), known)}")
        if value is None:
            continue
        if known[name] and isinstance(value, list) and not any(isinstance(v, dict | list) for v in value):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict | list):
            raise UserError(f"{path}: {name} must be one value, not {json.dumps(value)}.")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _check_values(config: TrainConfig) -> None:
    """Ranges, before any long work starts."""
    flat = config.as_dict()

    def refuse(name: str, words: str) -> NoReturn:
        raise UserError(f"--{name} {flat[name]}: must be {words}.")

    for group in GROUPS:
        for name, rule in getattr(config, group).rules.items():
            if flat[name] is not None and not rule.holds(flat[name]):
                refuse(name, rule.words)
    if flat["mask_replace_prob"] + flat["random_replace_prob"] > 1:
        refuse("random_replace_prob", f"at most 1 - mask_replace_prob ({1 - flat['mask_replace_prob']:g})")
    if flat["warmup_ratio"] + flat["decay_ratio"] > 1 and flat["lr_scheduler_type"] == "warmup_stable_decay":
        refuse("decay_ratio", f"at most 1 - warmup_ratio ({1 - flat['warmup_ratio']:g})")
    if flat["ds_config"] is None:
        raise UserError(
            "--ds_config is needed: DeepSpeed's JSON, for example --ds_config ds_configs/zero2.json."
        )
    if (flat["model"] is None) != (flat["corpus"] is None):
        missing = "corpus" if flat["corpus"] is None else "model"
        raise UserError(
            f"--{missing} is missing. Give both --model and --corpus, or neither for the built-in demo."
        )
