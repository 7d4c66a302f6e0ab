"""The argument parser of all commands; training's adds the declared settings to it in ``parsing.py``."""

import argparse
import contextlib
import difflib
import errno
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dga_scale.config.user_code import HELP, import_code
from dga_scale.errors import GivenPath, UserError, naming_flags, origins_of

_WRONG_PATH = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
)  # fmt: skip
"""The numbers of the operating system's errors that say that a path is the wrong one."""


_IMPORT = "import_"
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # Python converts no more digits than 4,300
_NUMBER = re.compile(r"[+-]?([0-9]{1,4000}\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.I)
_NOTHING = re.compile(r"--[\w-]+=")
"""A flag with an empty value."""


def whole_number(text: str) -> int:
    """Parse a whole number of plain digits: Python's ``int`` takes ``1_0``, spaces and all scripts' digits.

    Raises:
        argparse.ArgumentTypeError: The text is none.
    """
    if not _WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number, such as 1000")
    return int(text)


def number(text: str) -> float:
    """Parse a number of plain digits, as ``whole_number``; infinity and NaN are refused where they are used.

    Raises:
        argparse.ArgumentTypeError: The text is none.
    """
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number, such as 0.5 or 1e-4")
    return float(text)


class PathText(str):
    """The type of an option that takes a path as text: also a model's name, or NAME=PATH. Else: ``Path``."""


class Count(argparse.Action):
    """The action of an option that takes a whole number, of at least ``least``."""

    def __init__(self, option_strings: Sequence[str], dest: str, least: int = 1, **settings: Any) -> None:
        super().__init__(option_strings, dest, type=int, **settings)
        self._least = least

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keep the number, or refuse it."""
        if values < self._least:
            raise UserError(f"{option_string} {values}: must be at least {self._least}.")
        if values >= 2**31:
            raise UserError(f"{option_string} {values}: must be below {2**31}.")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser of whole flags. An error is one line, without the usage; an unknown flag's has the nearest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.allow_abbrev = False
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def add_import(self) -> None:
        """Add ``--import``; ``run`` imports what it names before the work."""
        self.add_argument(
            "--import", nargs="+", default=[], metavar="FILE_OR_MODULE", dest=_IMPORT, help=HELP
        )

    def flags(self) -> list[str]:
        """Return the flags that the parser knows, with their dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def run(self, work: Callable[[Any], int], arguments: Sequence[str] | None = None) -> int:
        """Parse ``arguments`` (None: the command line), and return what ``work`` does with the options.

        Raises:
            UserError: As ``parse_args``, or of ``work``; or a path among the options can't be read or
                written. A path that is refused is named with its flag.
        """
        options = self.parse_args(arguments)
        with refusing_wrong_paths(self.paths(options)):
            import_code(getattr(options, _IMPORT, []))
            return work(options)

    def paths(self, options: argparse.Namespace) -> list[GivenPath]:
        """List the paths among parsed options, with their flags; a path without one has its metavar."""
        given = []
        for action in self._actions:
            flag = action.option_strings[-1] if action.option_strings else str(action.metavar)
            values = getattr(options, action.dest, None)
            for text in values if isinstance(values, list) else [values]:
                if isinstance(text, PathText | Path):
                    _, _, behind = str(text).partition("=")
                    given += [GivenPath(flag, str(text), path) for path in (str(text), behind) if path]
        return given

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse the arguments (None: the command line).

        Raises:
            UserError: An unknown flag, named before any that is missing, which may be what was meant; a
                missing or wrong value.
        """
        words = list(sys.argv[1:] if args is None else args)
        self.refuse_unknown_flags(words)
        self.refuse_doubled_flags(words)
        found, stray = self.parse_known_args(words, namespace)
        if stray:
            self.error(f"{stray[0]!r} belongs to no option")
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{action.option_strings[-1]} {value}: must be a finite number.")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse what the parser knows of the arguments (None: the command line), and return the others too.

        Raises:
            UserError: A flag with an empty value, which is what an unset variable of a script gives; a
                missing or wrong value.
        """
        words = list(sys.argv[1:] if args is None else args)
        for word, behind in zip(words, [*words[1:], None], strict=True):
            if _NOTHING.fullmatch(word) or (word.startswith("--") and behind == ""):
                raise UserError(
                    f"{word.removesuffix('=')} '': is empty. Give a value, or leave the flag out."
                )
        return super().parse_known_args(words, namespace)

    def refuse_unknown_flags(self, words: Sequence[str]) -> None:
        """Raise a ``UserError`` with the nearest known flag at the first unknown one."""
        for word in words:
            flag = word.split("=", 1)[0]
            # As argparse does: a word with a space is a value.
            if flag.startswith("--") and " " not in word and flag not in {*self.flags(), "--"}:
                raise UserError(f"unknown option {flag}.{nearest(flag, self.flags())} See --help")

    def refuse_doubled_flags(self, words: Iterable[str]) -> None:
        """Raise a ``UserError`` at the first flag that is given twice, unless its values add up."""
        once = {
            flag: action.option_strings[-1]
            for action in self._actions
            for flag in action.option_strings
            if not isinstance(action, argparse._AppendAction)
        }
        given = [once[flag] for word in words if (flag := word.split("=", 1)[0]) in once]
        refuse_doubled(given)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else '.'} See --help")


@contextlib.contextmanager
def refusing_wrong_paths(given: Sequence[GivenPath]) -> Iterator[None]:
    """Refuse a path that the operating system says is wrong, and name the flag of whatever path is refused.

    Raises:
        UserError: As ``naming_flags``; or a path that was given, or one in or above it, is wrong.
    """
    with naming_flags(given):
        try:
            yield
        except OSError as error:
            if error.errno not in _WRONG_PATH:
                raise
            path = str(error.filename or "")
            # A folder above the given one could not be made.
            above = (each.path for each in given if Path(path) in Path(each.path).parents)
            wrong = path if origins_of(path, given) else next(above, None)
            if wrong is None or not path:
                raise
            raise UserError(f"{error.strerror}. Give another path.", wrong) from error


def refuse_doubled(flags: Iterable[str]) -> None:
    """Refuse a flag that is given twice, of which only the last value would be taken.

    Raises:
        UserError: It names the first such flag.
    """
    seen = set()
    for flag in flags:
        if flag in seen:
            raise UserError(f"{flag} is given twice. Give it once, with all that it takes.")
        seen.add(flag)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` where a known name is near, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""
