"""The error for mistakes of the user, and the frame of every entry point that reports it."""

import atexit
import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from dga_scale.streams import keep_streams, write_stderr

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

    Args:
        problem: The message, without the path.
        path: The path, or name of a model, that can't be used; it stands before the problem, and behind the
            flag that gave it (``naming_flags``).
    """

    def __init__(self, problem: str, path: object = None) -> None:
        super().__init__(problem if path is None else f"{path}: {problem}")
        self.problem = problem
        self.path = None if path is None else str(path)  # a Path would fold an address's two slashes
        self.reported = False
        """Whether it was printed, by this rank or by rank 0 for all."""

    def report(self) -> None:
        """Print the error line, unless that was done."""
        if not self.reported:
            print(f"error: {one_line(str(self))}", file=sys.stderr, flush=True)
        self.reported = True


class GivenPath(NamedTuple):
    """A path, or name of a model, that a user gave."""

    flag: str
    """The flag, or the file and the key in it: "--corpus", "suite.yaml: domain_corpora"."""
    text: str
    """The text as it was given: "acl=corpora/acl"."""
    path: str
    """The path in it: "corpora/acl"."""


@contextlib.contextmanager
def naming_flags(given: Iterable[GivenPath]) -> Iterator[None]:
    """Name the flag in the refusal of a path that a flag gave, or of a path that lies in such a folder.

    What reads a path does not know which flag gave it: it raises a ``UserError`` with the path. Each command
    works inside this context.

    Raises:
        UserError: ``FLAG TEXT: PROBLEM``; with all flags where several gave the path. One of no given path
            passes as it is.
    """
    given = list(given)
    try:
        yield
    except UserError as error:
        if error.path is None or not (origins := origins_of(error.path, given)):
            raise
        flags, path = ", ".join(dict.fromkeys(each.flag for each in origins)), Path(error.path)
        inside = "" if path == Path(origins[0].path) else f"{path.relative_to(origins[0].path)}: "
        raise UserError(f"{flags} {origins[0].text}: {inside}{error.problem}") from error


def origins_of(path: str, given: Iterable[GivenPath]) -> list[GivenPath]:
    """Return what gave the path itself, or else the innermost folder that it lies in."""
    around = [each for each in given if Path(path).is_relative_to(each.path)]
    depth = max((len(Path(each.path).parts) for each in around), default=0)
    return [each for each in around if len(Path(each.path).parts) == depth]


def run_main(
    main: Callable[[], int | None],
    end: Callable[[int], NoReturn] = sys.exit,
    *,
    prints_result: bool = False,
) -> NoReturn:
    """Run an entry point and end with its code; a ``UserError`` prints one line and gives code 2.

    The umask is tightened, so that no other user can write the files of a run whatever the caller's umask.
    Where stdout can't be written (any more), the work goes on and a line on stderr says so once; a command
    whose result it was ends with code 1 then, and says nothing where its reader has closed a pipe.

    Args:
        main: The entry point. It returns the exit code; None is 0.
        end: What ends the process with that code.
        prints_result: Whether the command's result is what it prints.
    """
    os.umask(os.umask(0o077) | 0o002)
    lost: list[OSError] = []

    def on_loss(error: OSError) -> None:
        lost.append(error)
        if prints_result and not isinstance(error, BrokenPipeError):
            write_stderr(f"error: stdout: {error.strerror}")
        elif not prints_result:
            write_stderr(f"note: nothing is printed any more (stdout: {error.strerror}); the work goes on")

    keep_streams(on_loss)
    try:
        code = main() or 0
    except UserError as error:
        error.report()
        code = EXIT_USER_ERROR
    except SystemExit as done:  # --help
        code = int(done.code or 0)
    sys.stdout.flush()
    end(1 if prints_result and lost and code == 0 else code)


def end_rank(code: int) -> NoReturn:
    """End the process of a rank with ``code``, without the interpreter's shutdown.

    Gloo's threads outlive the process group that is destroyed, because DeepSpeed's engine still refers to it.
    One that drops its last tensor while the interpreter shuts down aborts the process (exit code 134), though
    the run is complete.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def note(text: str) -> None:
    """Print one line on stderr that says what a user may not have meant, whatever names it quotes."""
    print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


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
