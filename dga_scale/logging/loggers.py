"""The loggers that ``--loggers`` names: a new one is a module with its class, and an entry here."""

from collections.abc import Callable, Sequence

from dga_scale.config.arguments import nearest
from dga_scale.errors import UserError
from dga_scale.logging.logger import LoggedRun, Logger
from dga_scale.logging.tensorboard import TensorBoard

LOGGERS: dict[str, Callable[[LoggedRun, Callable[[str], None]], Logger]] = {
    "tensorboard": TensorBoard,
    "none": Logger,
}
"""Beside ``log.jsonl`` and the terminal, which every run has. Called with the run, and what prints a line."""

DEFAULT = ("tensorboard",)
"""Those of a run that names none."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a name that is not in the table.

    Raises:
        UserError: It is not, with those that are and the nearest.
    """
    for name in names:
        if name not in LOGGERS:
            raise UserError(
                f"--loggers {name}: there is no such logger. Choose among {', '.join(LOGGERS)}."
                + nearest(name, LOGGERS)
            )
