"""JSON files of ours as values of our dataclasses: the annotation of a field is the check of its value.

A file may come from another version, or have been edited: each field is looked at before any is used, and a
wrong one is named with its file. What the annotations mean::

    bool, str, float      that; a float may be written as a whole number, and is finite
    int                   a whole number from 0 to 2^64 - 1; others: Annotated[int, Rule(...)]
    X | None, list[X], tuple[X, ...], tuple[X, Y], dict[str, X], Literal["x", "y"]
    a dataclass, a named tuple
    Any                   not looked at
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dga_scale.config.declaration import WORDS, Rule, shown
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import load_json

T = TypeVar("T")


def _inside(path: str) -> bool:
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts)


FileName = Annotated[
    str, Rule(lambda name: _inside(name) and "/" not in name, "the name of a file in the same folder")
]
InnerPath = Annotated[str, Rule(_inside, "the path of a file below the same folder")]
SignedInt = Annotated[int, Rule(lambda value: -(2**63) <= value < 2**63, "from -2^63 to 2^63 - 1")]

_ANY = Rule(lambda value: True, "")
_WHOLE = Rule(lambda value: 0 <= value < 2**64, "from 0 to 2^64 - 1")
_FINITE = Rule(lambda value: -sys.float_info.max <= value <= sys.float_info.max, "a finite number")


def read_typed(path: Path, kind: type[T], fix: str) -> T:
    """Read a JSON file of ours as a value of a type.

    Args:
        path: The file.
        kind: The type, see above.
        fix: What to do about a file that is damaged, as a sentence.

    Raises:
        UserError: The file can't be read or is no JSON, or a field is unknown, missing or wrong.
    """
    try:
        found: T = build(kind, load_json(path))
    except OSError as error:
        raise UserError(f"it can't be read: {error.strerror}. {fix}", path) from error
    except ValueError as error:
        raise UserError(f"damaged ({error}). {fix}", path) from error
    return found


def check_fields(content: Any, kinds: Mapping[str, Any], at: str = "", needed: bool = False) -> None:
    """Check those fields of an object that ``kinds`` gives a type; others are not looked at.

    Args:
        content: The object.
        kinds: The types by the names of the fields.
        at: Where the object stands, with a dot at its end; empty for a whole file.
        needed: Whether all have to be there.

    Raises:
        ValueError: As ``build``; or it is no object.
    """
    if not isinstance(content, dict):
        raise _wrong(at[:-1] or "it", content, "an object")
    for name, kind in kinds.items():
        if name in content:
            build(kind, content[name], f"{at}{name}")
        elif needed:
            raise ValueError(f"{at}{name} is missing")


def build(kind: Any, value: Any, at: str = "it") -> Any:
    """Build a value of a type from plain JSON data.

    Args:
        kind: The type, see above.
        value: The data.
        at: The field that it stands in, for the message: ``shards[0].rows``.

    Raises:
        ValueError: The data is not of the type; the message names the field and what it must be.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        (inner,) = (each for each in arguments if each is not NoneType)
        return None if value is None else build(inner, value, at)
    if origin is Annotated:
        return _scalar(arguments[0], value, arguments[1], at)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise _wrong(at, value, f"one of {', '.join(arguments)}")
        return value
    if origin in (list, tuple):
        return origin(_entries(arguments, value, at))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(at, value, "an object")
        return {build(arguments[0], k, at): build(arguments[1], v, f"{at}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_field_defaults"):
        return _object(kind, value, at)
    return _scalar(kind, value, _WHOLE if kind is int else _ANY, at)


def _scalar(kind: type, value: Any, rule: Rule, at: str) -> Any:
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
        raise _wrong(at, value, WORDS[kind])
    if kind is float and not _FINITE.holds(value):
        raise _wrong(at, value, _FINITE.words)
    if not rule.holds(value):
        raise _wrong(at, value, rule.words)
    return value


def _entries(kinds: tuple[Any, ...], value: Any, at: str) -> Iterator[Any]:
    """Yield the entries of a list[X], a tuple[X, ...], or a tuple of so many kinds."""
    fixed = len(kinds) > 1 and kinds[-1] is not Ellipsis
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(kinds)):
        raise _wrong(at, value, f"a list of {len(kinds)}" if fixed else "a list")
    for number, entry in enumerate(value):
        yield build(kinds[number] if fixed else kinds[0], entry, f"{at}[{number}]")


def _object(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(at, value, "an object")
    hints, needed = _fields(kind)
    above = "" if at == "it" else f"{at}."
    for name in sorted(value.keys() - hints.keys()):
        raise ValueError(f"{above}{name} is no field that this version knows")
    for name in sorted(needed - value.keys()):
        raise ValueError(f"{above}{name} is missing")
    return kind(**{name: build(hints[name], entry, f"{above}{name}") for name, entry in value.items()})


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types of the fields of a dataclass or a named tuple, and those without a default."""
    hints = get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        return hints, frozenset(hints.keys() - kind._field_defaults.keys())
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    needed = [each.name for each in fields if (each.default, each.default_factory) == (missing, missing)]
    return {each.name: hints[each.name] for each in fields}, frozenset(needed)


def _wrong(at: str, value: Any, words: str) -> ValueError:
    return ValueError(f"{at} is {shown(value)}, and must be {words}")
