"""Read YAML files together with the line of every entry, so that an error can name the line."""

from pathlib import Path
from typing import Any

import yaml

from dga_scale.errors import UserError

Lines = dict[tuple[Any, ...], int]
"""The line of each key and list entry by its path: ("recipe", "epochs"), ("corpora", 0)."""


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """Read the file's content and the lines of its entries.

    Raises:
        UserError: The file can't be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines: Lines = {}
        _collect(yaml.compose(text, Loader=yaml.SafeLoader), (), lines)
        return yaml.safe_load(text), lines
    except OSError as error:
        raise UserError(f"{error.strerror}. Give the path of a YAML file.", path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}", path) from None


def _collect(node: yaml.Node | None, at: tuple[Any, ...], lines: Lines) -> None:
    entries: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        entries = [(yaml.safe_load(yaml.serialize(key)), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(number, value, value) for number, value in enumerate(node.value)]
    for name, start, value in entries:
        lines[(*at, name)] = start.start_mark.line + 1
        _collect(value, (*at, name), lines)
