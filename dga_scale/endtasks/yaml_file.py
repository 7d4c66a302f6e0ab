"""YAML files read with the line of every entry, so that a mistake can be shown its place."""

from pathlib import Path
from typing import Any

import yaml

from dga_scale.errors import UserError

Lines = dict[tuple[Any, ...], int]
"""Line of each key and list entry by the path to it: ("recipe", "epochs"), ("corpora", 0)."""


def read_yaml(path: Path, flag: str) -> tuple[Any, Lines]:
    """The file's content, and its lines.

    Raises:
        UserError: no such file, or no YAML; ``flag`` is what the user gave it by.

    """
    try:
        text = path.read_text(encoding="utf-8")
        lines: Lines = {}
        _collect(yaml.compose(text, Loader=yaml.SafeLoader), (), lines)
        return yaml.safe_load(text), lines
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} is not YAML: {' '.join(str(error).split())}") from None


def _collect(node: yaml.Node | None, at: tuple[Any, ...], lines: Lines) -> None:
    entries: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        entries = [(yaml.safe_load(yaml.serialize(key)), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(number, value, value) for number, value in enumerate(node.value)]
    for name, place, value in entries:
        lines[(*at, name)] = place.start_mark.line + 1
        _collect(value, (*at, name), lines)
