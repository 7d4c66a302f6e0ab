"""The argument parser of all commands; training's adds the declared settings to it in ``parsing.py``."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from dga_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser of whole flags. An error is one line, without the usage; an unknown flag's has the nearest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.allow_abbrev = False

    def flags(self) -> list[str]:
        """Return the flags that the parser knows, with their dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse the arguments (None: the command line).

        Raises:
            UserError: an unknown flag, named before any that is missing, which may be what was meant; a
                missing or wrong value.
        """
        words = list(sys.argv[1:] if args is None else args)
        self.refuse_unknown_flags(words)
        found, stray = self.parse_known_args(words, namespace)
        if stray:
            self.error(f"{stray[0]!r} belongs to no option")
        return found

    def refuse_unknown_flags(self, words: Sequence[str]) -> None:
        """Raise a ``UserError`` with the nearest known flag at the first unknown one."""
        for word in words:
            flag = word.split("=", 1)[0]
            # As argparse does: a word with a space is a value.
            if flag.startswith("--") and " " not in word and flag not in {*self.flags(), "--"}:
                raise UserError(f"unknown option {flag}.{nearest(flag, self.flags())} See --help")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else '.'} See --help")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` where a known name is near, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""
