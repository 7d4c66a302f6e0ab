"""The error for mistakes of the user, and the frame of every entry point that reports it."""

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
    """A mistake that the user can fix; it is shown without a traceback.

    The message names the value (with file and line where there is one), why it can't be used, and what to do
    instead.
    """


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code; a ``UserError`` prints one line and exits with 2.

    The umask is tightened, so that no other user can write the files of a run whatever the caller's umask.
    """
    os.umask(os.umask(0o077) | 0o002)
    try:
        code = main()
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    sys.exit(code or 0)


def without_secrets(text: str) -> str:
    """Blank out passwords and tokens that a message quotes from an address, because logs outlive runs."""
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1] if found.re.groups else ''}***", text)
    return text
