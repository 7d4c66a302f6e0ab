"""The argument parser of all commands; training's adds the declared settings to it in ``parsing.py``."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from dga_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else '.'} See --help")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` where a known name is near, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""
