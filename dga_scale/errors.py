"""The error for mistakes of the user, and the frame of every entry point that reports it."""

import atexit
import contextlib
import os
import re
import sys
import unicodedata
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


def run_main(main: Callable[[], int | None], end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run an entry point and end with its code; a ``UserError`` prints one line and gives code 2.

    The umask is tightened, so that no other user can write the files of a run whatever the caller's umask.

    Args:
        main: The entry point. It returns the exit code; None is 0.
        end: What ends the process with that code.
    """
    os.umask(os.umask(0o077) | 0o002)
    try:
        code = main()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    end(code or 0)


def end_rank(code: int) -> NoReturn:
    """End the process of a rank with ``code``, without the interpreter's shutdown.

    Gloo's threads outlive the process group that is destroyed, because DeepSpeed's engine still refers to it.
    One that drops its last tensor while the interpreter shuts down aborts the process (exit code 134), though
    the run is complete.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def one_line(text: str) -> str:
    """Make a message fit to be shown and logged, where it quotes an address or the name of a file.

    Passwords and tokens are blanked out, because logs outlive runs. Line breaks, the control characters that
    terminals obey, and bytes of a name that are no text are escaped.
    """
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1] if found.re.groups else ''}***", text)
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )
