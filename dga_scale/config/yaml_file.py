"""Read YAML files together with the line of every entry, so that an error can name the line."""

from pathlib import Path
from typing import Any

import yaml

from dga_scale.errors import UserError

_MOST_DIGITS = 4000
"""Python does not write longer ones out, in whatever base they are read."""

Lines = dict[tuple[Any, ...], int]
"""The line of each key and list entry by its path: ("recipe", "epochs"), ("corpora", 0)."""


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """Read the file's content and the lines of its entries.

    Raises:
        UserError: The file can't be read, is not YAML, or has a key twice in one mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
        lines: Lines = {}
        _collect(path, root, (), lines, set())
    except OSError as error:
        raise UserError(f"{error.strerror}. Give the path of a YAML file.", path) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"not UTF-8: byte 0x{error.object[error.start]:02x}. Write it as UTF-8.", f"{path}:{line}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a number, a date, or too deep nesting
        raise UserError(f"not YAML: {' '.join(str(error).split())}", path) from None
    return content, lines


def _collect(
    path: Path, node: yaml.Node | None, at: tuple[Any, ...], lines: Lines, seen: set[yaml.Node]
) -> None:
    if node is None or node in seen:  # an alias, which may lead back to what holds it
        return
    seen.add(node)
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
        where = f"{path}:{node.start_mark.line + 1}"
        raise UserError("a number of thousands of digits. Write another.", where)
    entries: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        entries = [(yaml.safe_load(yaml.serialize(key)), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(number, value, value) for number, value in enumerate(node.value)]
    for name, start, value in entries:
        line = start.start_mark.line + 1
        if (*at, name) in lines:
            raise UserError(f"{name!r} stands twice in one mapping. Remove one.", f"{path}:{line}")
        lines[(*at, name)] = line
        _collect(path, value, (*at, name), lines, seen)
