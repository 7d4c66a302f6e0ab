"""The argument parser of all commands but training's, whose settings have one of their own."""

import argparse
from typing import NoReturn

from dga_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors as ours: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help")
