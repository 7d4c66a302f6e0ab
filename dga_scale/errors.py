"""The one error a user sees, and how every entry point ends on it."""

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
"""Exit code of every command that stopped because of a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend. The message names the value (file and line where there is one),
    why it can't be used, and what to do instead. Shown without a traceback."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code; a ``UserError`` prints one line and exits with 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    sys.exit(code or 0)
