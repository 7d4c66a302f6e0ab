"""Warnings are errors in the processes that tests start, too, by the one list in pyproject.toml."""

import sys
import threading
import traceback
from typing import Any

LOST = "Exception ignored in"
"""What Python prints of an error in ``__del__``, for one the ResourceWarning of a file left open; a command's
exit code stays 0."""


def python_warnings(filters: list[str]) -> str:
    """Turn pytest's ``filterwarnings`` into the value of PYTHONWARNINGS, which every child process inherits.

    Raises:
        ValueError: a filter that means another thing there: pytest takes a message for a pattern, Python for
            the start of the text; commas part Python's filters.
    """
    for each in filters:
        if set(each) & set(r",\()[]{}*+?|^$"):
            raise ValueError(f"filterwarnings {each!r}: give the plain start of the message, without commas")
    return ",".join(filters)


def collect_lost_errors() -> list[str]:
    """Begin to collect the tracebacks that this process would print and forget: a list that grows.

    They are errors in threads and in ``__del__``, for one the ResourceWarning of a file left open.
    """
    lost: list[str] = []

    def keep(error: Any) -> None:
        lines = traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback)
        lost.append("".join(lines))

    sys.unraisablehook = threading.excepthook = keep
    return lost
