"""Standard output and error that may be gone: ``| head -1``, ``>&-``, ``> /dev/full``.

Most commands write what they find into files and only say on stdout how far they are. Whoever stops reading
does not mean to stop them, and a run of days must not end because the disk behind its ``>`` is full.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

STDIN, STDOUT, STDERR = range(3)


class Stream(io.FileIO):
    """A descriptor that drops what can't be written, from the first time on.

    ``/dev/null`` takes its place, for child processes and libraries too.

    Args:
        number: The descriptor.
        on_loss: Called with the error of the first write that fails.
    """

    def __init__(self, number: int, on_loss: Callable[[OSError], None]) -> None:
        super().__init__(number, "wb", closefd=False)
        self._on_loss = on_loss

    def write(self, data: Any, /) -> int:
        """Write ``data``, or drop it, and return the number of bytes that are done with."""
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self._on_loss(error)
            return len(data)


def keep_streams(on_loss: Callable[[OSError], None]) -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` of this process such that no ``print`` fails.

    Streams that somebody has put in their place (tests) are left as they are. Descriptors that are closed are
    opened: the next file would get their number, and with it what C libraries print.

    Args:
        on_loss: Called, once, with the error that makes stdout fail; at once where it is closed.
    """
    closed = [number for number in (STDIN, STDOUT, STDERR) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrapped(sys.stdout, STDOUT, on_loss)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrapped(sys.stderr, STDERR, lambda error: None)
    if STDOUT in closed:
        on_loss(OSError(errno.EBADF, os.strerror(errno.EBADF)))


def write_stderr(text: str) -> None:
    """Write a line to stderr from any thread, or drop it where nobody can read it."""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"{text}\n".encode(errors="backslashreplace"))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _wrapped(former: TextIO | None, number: int, on_loss: Callable[[OSError], None]) -> TextIO:
    raw = Stream(number, on_loss)
    if not isinstance(former, io.TextIOWrapper):  # None: Python found it closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    return io.TextIOWrapper(
        raw if former.write_through else io.BufferedWriter(raw),  # python -u
        former.encoding,
        former.errors,
        line_buffering=former.line_buffering,
        write_through=former.write_through,
    )
