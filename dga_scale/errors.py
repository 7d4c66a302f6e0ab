"""The one error a user sees, and how every entry point ends on it."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
"""Exit code of every command that stopped because of a user's mistake."""


_SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password of an address
    re.compile(
        r"(?<=[?&])([\w.-]*(?:token|key|secret|password|signature|credential)[\w.-]*=)[^&\s'\"]+", re.I
    ),
    re.compile(r"\bhf_\w{16,}"),  # the Hugging Face hub's tokens
)


class UserError(Exception):
    """A mistake the user can mend. The message names the value (file and line where there is one),
    why it can't be used, and what to do instead. Shown without a traceback."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code; a ``UserError`` prints one line and exits with 2.

    Whatever the caller's umask, nothing that it writes can be written by everybody.
    """
    os.umask(os.umask(0o077) | 0o002)
    try:
        code = main()
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    sys.exit(code or 0)


def without_secrets(text: str) -> str:
    """Blank out passwords and tokens that a message quotes from an address: logs outlive runs."""
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1] if found.re.groups else ''}***", text)
    return text
