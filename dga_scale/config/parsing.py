"""Parse a training run's settings from its flags and its YAML file; unknown names are refused. Flags win.

Neither torch nor transformers is imported: help and a refused flag take no seconds.
"""

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.arguments import Parser, nearest, number, refuse_doubled, whole_number
from dga_scale.config.declaration import WORDS, Setting, as_typed, declared, flag_name, shown
from dga_scale.config.hints import HINTS
from dga_scale.config.methods import DEFAULT, METHOD_SETTINGS, known_settings
from dga_scale.config.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    TrainConfig,
)
from dga_scale.config.yaml_file import read_yaml
from dga_scale.errors import GivenPath, UserError, naming_flags

_LAUNCHER_FLAG = "local_rank"
"""deepspeed's launcher passes it to every program; the environment says the same, so nothing reads it."""


def _own_settings(method: str) -> list[str]:
    return [each.name for each in declared(METHOD_SETTINGS[method])]


class _Help(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the list of methods as it is written."""


class _TrainParser(Parser):
    """A parser of a method's settings; the list of all methods takes as long, and is made for help only."""

    method: str

    def format_help(self) -> str:
        self.epilog = _other_methods(self.method)
        return super().format_help()


def build_parser(method: str, prog: str = "dga-train") -> Parser:
    """Build the parser of a method's settings, with a section in ``--help`` for each group."""
    parser = _TrainParser(
        prog=prog,
        usage=f"{prog} --ds_config FILE.json --model MODEL --corpus FOLDER [--method NAME] [settings]",
        description="Adapt a pretrained language model to a domain and keep what it knows.",
        formatter_class=_Help,
    )
    parser.method = method
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Settings as YAML, by the names below. Flags win."
    )
    parser.add_argument(
        "--method",
        default=DEFAULT,
        choices=list(METHOD_SETTINGS),
        help=f"What is learnt; see below. (default: {DEFAULT})",
    )
    groups: dict[str, type[Any]] = {
        "model": ModelSettings,
        "data": DataSettings,
        "the method's own settings": METHOD_SETTINGS[method],
        "optimization": OptimizationSettings,
        "run": RunSettings,
    }
    for title, group in groups.items():
        _add_group(parser, title, group)
    return parser


def _add_group(parser: Parser, title: str, group: type[Any]) -> None:
    section = parser.add_argument_group(title, group.__doc__)
    for each in declared(group):
        section.add_argument(f"--{each.name}", **_argument(each))


def _argument(each: Setting) -> dict[str, Any]:
    """Return argparse's arguments for a setting."""
    about = [each.help]
    if each.source:
        about.append(_sentence(f"Source: {each.source}"))
    if each.default is not None:
        about.append(f"(default: {as_typed(each.default)})")
    argument: dict[str, Any] = {
        "default": each.default,
        "help": " ".join(about).replace("%", "%%"),  # argparse fills % in
        "metavar": f"{{{','.join(each.choices)}}}" if each.choices else each.name.upper(),
    }
    if each.type is bool:  # a bare flag switches it on
        return argument | {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    plain: Any = {int: whole_number, float: number}.get(each.type, each.type)
    kind = partial(_choice, each.choices) if each.choices else plain
    return argument | {"type": kind, "nargs": "+" if each.is_list else None}


def _sentence(text: str) -> str:
    """End a text with a full stop, which ``et al.`` brings along."""
    return text if text.endswith(".") else f"{text}."


def _choice(choices: Collection[str], text: str) -> str:
    if text not in choices:
        hint = nearest(text, choices)
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(choices)}{'.' if hint else ''}{hint}"
        )
    return text


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _other_methods(chosen: str) -> str:
    """Format the list below the settings in ``--help``: each method, its own settings under its name."""
    parts = []
    for name, settings in METHOD_SETTINGS.items():
        section = Parser(usage=argparse.SUPPRESS, add_help=False)
        _add_group(section, name, settings)
        head = f"--method {name}{' (chosen)' if name == chosen else ''}: {settings.summary}"
        # Below the group's title and its description.
        lines = [line for line in section.format_help().splitlines() if line.strip()][2:]
        if name == chosen:
            lines = ["  its settings are among those above"]
        parts.append("\n".join([head, *lines]))
    return "methods:\n\n" + "\n\n".join(parts)


def read_config(arguments: Sequence[str] | None = None, also: Iterable[str] = ()) -> TrainConfig:
    """Read the settings from command-line arguments (None: this process's) and the YAML file they name.

    Args:
        arguments: The flags and their values.
        also: The flags of a command that passes its other ones on; one of them may be the nearest name.

    Raises:
        UserError: Unknown name (with the nearest right one), a setting of another method, a value of the
            wrong type or out of range, a YAML file that is missing or not a mapping.
    """
    arguments = without_flag(_LAUNCHER_FLAG, sys.argv[1:] if arguments is None else arguments)
    takes_list = {"method": False} | {name: each.is_list for name, each in known_settings().items()}
    known = [*takes_list, *map(_name, also)]
    for argument in arguments:
        name = _name(argument)
        if argument.startswith("--") and name not in {*takes_list, "config", "help"}:
            raise UserError(f"unknown setting --{name}.{_hint(name, known)} See --help.")
    refuse_doubled(f"--{_name(argument)}" for argument in arguments if argument.startswith("--"))
    from_file = _yaml_arguments(_value_of("config", arguments), takes_list)
    given = [_normal(argument) for argument in (*from_file, *arguments)]
    method = _value_of("method", given) or DEFAULT
    if method not in METHOD_SETTINGS:
        there_is = ", ".join(METHOD_SETTINGS)
        raise UserError(f"--method {method}: there is {there_is}.{nearest(method, METHOD_SETTINGS)}")
    explicit = {_name(argument) for argument in given if argument.startswith("--")}
    _refuse_settings_of_others(method, explicit)
    found, unknown = build_parser(method).parse_known_args(given)
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no setting. Write --name value. See --help.")
    values = vars(found)

    def group(settings: type[Any]) -> Any:
        return settings(**{each.name: values[flag_name(each.name)] for each in fields(settings)})

    config = TrainConfig(
        model=group(ModelSettings),
        data=group(DataSettings),
        method=group(METHOD_SETTINGS[method]),
        optimization=group(OptimizationSettings),
        run=group(RunSettings),
        explicit=frozenset(explicit & set(takes_list)),
    )
    _check_values(config)
    return config


def _refuse_settings_of_others(method: str, explicit: Iterable[str]) -> None:
    owners = {
        name: [other for other in METHOD_SETTINGS if name in _own_settings(other)]
        for name in sorted(explicit)
    }
    for name, methods in owners.items():
        if methods and method not in methods:
            raise UserError(
                f"--{name} is a setting of --method {', '.join(methods)}; this run's is {method}, which does "
                "not read it. Leave it out, or choose another method."
            )


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the hint for another trainer's setting, or the nearest name."""
    return f" Here {HINTS[name]}." if name in HINTS else nearest(name, known)


def without_flag(name: str, arguments: Iterable[str]) -> list[str]:
    """Remove a flag and its value, in one word or two."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.startswith("--") and _name(word) == name:
            if "=" not in word:
                next(words, None)
        else:
            kept.append(word)
    return kept


def _name(argument: str) -> str:
    """Return a flag's name, ``--max-steps=3`` -> ``max_steps``: dashes and underscores mean the same."""
    return argument.split("=", 1)[0].removeprefix("--").replace("-", "_")


def _normal(argument: str) -> str:
    """Normalise a flag, ``--max-steps=3`` -> ``--max_steps=3``; what is no flag stays as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return f"--{_name(flag)}{equals}{value}"


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    value = None
    for index, argument in enumerate(arguments):
        if argument.startswith("--") and _name(argument) == name:
            if "=" in argument:
                value = argument.split("=", 1)[1]
            elif index + 1 < len(arguments):
                value = arguments[index + 1]
    return value


def _yaml_arguments(path: str | None, takes_list: Mapping[str, bool]) -> list[str]:
    """Turn the YAML file's settings into command-line arguments: one parser converts and checks both."""
    if path is None:
        return []
    with naming_flags([GivenPath("--config", path, path)]):
        content, lines = read_yaml(Path(path))
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no settings. Write one `name: value` a line.")
    arguments, known = [], known_settings()
    for name, value in content.items():
        where = f"{path}:{lines[(name,)]}"
        if name not in takes_list:
            raise UserError(f"{where}: unknown setting {name!r}.{_hint(str(name), takes_list)}")
        if value is None:
            continue
        if name in known:
            _check_kind(known[name], value, where)
        plain = isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value)
        if takes_list[name] and plain:
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict | list):
            raise UserError(f"{where}: {name} must be one value, not {shown(value)}.")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _check_kind(each: Setting, value: Any, where: str) -> None:
    """Refuse a value of the YAML file that a flag would not take, with its line."""
    if isinstance(value, dict) or (isinstance(value, list) != each.is_list and isinstance(value, list)):
        return  # refused by what it is, below
    entries = value if isinstance(value, list) else [value]
    words: str | None = WORDS[each.type]
    try:
        if any(isinstance(entry, bytes | set) for entry in entries):
            raise ValueError
        parsed = [_argument(each)["type"](str(entry)) for entry in entries]
    except (ValueError, argparse.ArgumentTypeError):
        words = f"one of {', '.join(each.choices)}" if each.choices else WORDS[each.type]
    else:
        words = each.problem(parsed if each.is_list else parsed[0]) or ""
    if words:
        written = shown(value) if isinstance(value, list) else str(value)[:60]
        raise UserError(f"{where}: {each.name} is {written!r}, and must be {words}.")


def _check_values(config: TrainConfig) -> None:
    """Check the values' ranges, before any long work starts."""
    flat = config.as_dict()

    def refuse(name: str, words: str) -> NoReturn:
        raise UserError(f"--{name} {flat[name]}: must be {words}.")

    for each in config.settings():
        value = flat[each.name]
        if words := each.problem(value):
            refuse(each.name, words)
        if each.is_set and value is not None and (twice := [v for v in value if value.count(v) > 1]):
            raise UserError(f"--{each.name} {' '.join(value)}: {twice[0]} is named twice; name it once.")
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
