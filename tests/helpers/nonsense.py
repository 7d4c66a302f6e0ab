"""Nonsense for settings and files, and what a program may answer to it: one line and exit code 2.

``FUZZ=20 python -m pytest tests/fuzz`` tries twenty times as many drawn examples as the suite does, and other
ones each time; without it the examples are always the same.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dga_scale.errors import UserError, one_line

TIMES = int(os.environ.get("FUZZ", "0"))

DIGITS = "9" * 5000
DEEP = "[" * 5000 + "]" * 5000
NUMBERS = ("nan", "inf", "-inf", "1e400", "-1e400", DIGITS, f"-{DIGITS}", "0x" + "f" * 5000)
"""As they are typed: no number, infinities, and what is larger than any."""

HUGE = 10**30
WRONG: dict[type, list[Any]] = {
    bool: ["false", "yes", 0, 1, 2.5, None, [], {}, float("nan")],
    int: ["x", "3", "", 1.5, None, True, [], {}, [1], -1, -HUGE, HUGE, float("nan"), float("inf")],
    float: ["x", "3", "", None, True, [], {}, [1.0], float("nan"), float("inf"), float("-inf"), 10**400],
    str: [3, 1.5, None, True, [], {}, ["x"], float("nan")],
    list: ["x", 3, None, True, {}, {"x": 1}],
    dict: ["x", 3, None, True, [], ["x"]],
}
"""What is wrong in place of a value of a type, in a JSON file of ours."""

NAMES = ("../x", "/etc/hostname", "", ".", "..", "x/../../y", "a\0b", "a\nb", "\x1b[31mred", "\ud800", "a\\b")
"""What is no name of a file in the same folder."""

TEXT = st.text(st.characters(exclude_categories=[]), max_size=8) | st.sampled_from(NAMES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-HUGE, HUGE) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
"""Any JSON, and what is none: NaN, infinities, halves of characters."""


def fuzz(examples: int) -> settings:
    """The same examples each time; with ``FUZZ=N``, N times as many and others."""
    return settings(
        max_examples=examples * max(1, TIMES),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # a shorter example says no more
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def refusal(work: Callable[..., Any], *arguments: Any) -> str | None:
    """Return the line that refuses a mistake; None where it was accepted. Anything else is raised."""
    try:
        with redirect_stdout(io.StringIO()):
            work(*arguments)
    except UserError as error:
        line = one_line(str(error))
        assert line.isprintable()
        return line
    return None


def answer(command: Callable[[], Any], arguments: list[str]) -> tuple[int, str]:
    """Run an entry point in this process; return its exit code, and what it printed on stderr."""
    before, sys.argv, said = sys.argv, ["command", *arguments], io.StringIO()
    umask = os.umask(0o022)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            command()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = before
        os.umask(umask)
    return 0, said.getvalue()


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place of a JSON value, by its keys and indices, with what stands there."""
    if at:
        yield at, content
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from places(value, (*at, key))


def changed_at(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy of a JSON value with another value at a place; ``...`` removes what stands there."""
    content = json.loads(json.dumps(content))
    holder = content
    for key in at[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return content


def wrong_values(value: Any) -> list[Any]:
    """What is wrong in place of a value, by its type."""
    return WRONG[type(value)] if value is not None else []
