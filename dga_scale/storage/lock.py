"""One owner of a folder: two commands that write the same folder at once would destroy each other's work.

The owner holds a kernel lock (flock) on a file, which goes with the process however that ends: between
processes of one kernel nothing else decides, at once. Whether the hosts of a shared file system see each
other's kernel locks depends on its mount. Therefore the file names its owner too, and a thread of the owner
touches it every few seconds. Who gets the kernel lock on a file that names a process of another kernel
watches, by its own clock, whether it is touched, before it takes the folder over. An owner that was stopped
meanwhile finds another's name in the file when it wakes, and ends. Where a file system has no kernel locks,
names and touches alone decide.
"""

import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from dga_scale.errors import EXIT_USER_ERROR, UserError, one_line

LOCK_FILE = ".lock"
"""The name of the file in a folder that has an owner; where one was killed, it stays and holds nobody up."""

_NO_KERNEL_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_LONGEST = 4096
_held: "set[_Lock]" = set()


@dataclass(frozen=True)
class Periods:
    """The times of a lock, in seconds, the same for all that may want it."""

    beat: float = 10.0
    """The time between two touches of the file."""
    patience: float = 60.0
    """How long an owner of another kernel may be silent: several beats, and as long as NFS caches times."""
    settle: float = 1.0
    """How long a name may take to be written, and an owner that was killed to go."""


@dataclass(frozen=True)
class Owner:
    """What a lock file tells about its owner."""

    token: str
    host: str
    kernel: str
    pid: int
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since}: {self.command})"


class _Held(Exception):
    """Another process has the lock: which, and whether that is certain."""

    def __init__(self, owner: Owner | None, certain: bool) -> None:
        self.owner, self.certain = owner, certain


@contextmanager
def owned(folder: Path, *, group: str = "", periods: Periods = Periods()) -> Iterator[str]:
    """Be the owner of ``folder`` inside the context, or refuse; the folder is made where there is none.

    At the end the lock file is removed, and so is a folder that was made here and is empty.

    Args:
        folder: The folder.
        group: What the processes have in common that may own the folder together; empty: nothing.
        periods: The times of the lock.

    Yields:
        The token in the lock file, by which another process that reads the file knows this owner.

    Raises:
        UserError: Another process owns the folder, which is named; or it can't be written.
    """
    made = not folder.exists()
    try:
        with _Lock(folder, folder / LOCK_FILE, group, periods) as lock:
            yield lock.own.token
    finally:
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


@contextmanager
def owned_output(output: Path, *, periods: Periods = Periods()) -> Iterator[None]:
    """Be the only one to make ``output`` inside the context, whose file or folder appears when it is whole.

    The lock file lies beside it and is removed at the end.

    Raises:
        UserError: As ``owned``.
    """
    with _Lock(output, output.with_name(f".{output.name}{LOCK_FILE}"), "", periods):
        yield


def token_in(folder: Path) -> str | None:
    """Return the token of the owner that the folder's lock file names; None where there is none."""
    with suppress(OSError):
        if (owner := _read(folder / LOCK_FILE)[0]) is not None:
            return owner.token
    return None


class _Lock:
    def __init__(self, what: Path, file: Path, group: str, periods: Periods) -> None:
        self._what, self._file, self._group, self._periods = what, file, group, periods
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.own = Owner(
            token=group or secrets.token_hex(8),
            host=socket.gethostname(),
            kernel=_kernel(),
            pid=os.getpid(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            command=one_line(command if len(command) <= 300 else f"{command[:300]}..."),
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.descriptor = -1

    def __enter__(self) -> "_Lock":
        try:
            self._take()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "Free disk space" if full else "Give another folder, or change its permissions"
            raise UserError(f"it can't be locked: {error.strerror}. {fix}", self._what) from error
        self._folder = os.stat(self._file.parent)
        _held.add(self)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        _held.discard(self)
        with suppress(OSError):  # the folder is gone
            last = not self._group or _flock(self.descriptor, fcntl.LOCK_EX) is not False
            if last and self._names_us():
                os.unlink(self._file)  # before the kernel lock goes: who gets that looks whether it lies here
        os.close(self.descriptor)

    def _take(self) -> None:
        deadline = time.monotonic() + self._periods.settle
        while True:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.descriptor = self._attempt()
                return
            except FileNotFoundError:
                pass  # removed by its owner since it was opened
            except _Held as held:
                if held.certain or time.monotonic() > deadline:
                    raise self._refusal(held.owner) from None
            time.sleep(0.02)

    def _attempt(self) -> int:
        """Take the lock and return the descriptor that holds it.

        Raises:
            _Held: Another process has it.
            OSError: Also a ``FileNotFoundError``, where the file was removed meanwhile.
        """
        try:
            descriptor, new = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            descriptor, new = os.open(self._file, os.O_RDWR), False
        try:
            alone = _flock(descriptor, fcntl.LOCK_EX)
            owner, _ = _read(self._file)
            joins = bool(self._group) and owner is not None and owner.token == self.own.token
            if alone is False and not (joins and _flock(descriptor, fcntl.LOCK_SH)):
                raise _Held(owner, certain=False)
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._file)):
                raise FileNotFoundError
            decided = alone and owner is not None and owner.kernel == self.own.kernel
            if not (new or joins or decided):
                self._watch(owner)
            if not joins:
                content = json.dumps(asdict(self.own)).encode()
                os.pwrite(descriptor, content, 0)
                os.ftruncate(descriptor, len(content))
                os.fsync(descriptor)
            if not (new or joins or decided):  # another host may have watched too
                time.sleep(self._periods.settle)
                if not self._names_us():
                    raise _Held(_read(self._file)[0], certain=True)
            if self._group:
                _flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _watch(self, owner: Owner | None) -> None:
        """Wait until a silent owner counts as gone; one without a name has only to write it."""
        seconds = self._periods.settle
        if owner is not None:
            seconds = self._periods.patience
            text = f"{self._what}: {owner} was writing here: waiting {seconds:g} s for a sign of it"
            print(one_line(text), file=sys.stderr, flush=True)
        before, deadline = _read(self._file), time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(seconds, self._periods.beat) / 10)
            if (now := _read(self._file)) != before:
                raise _Held(now[0], certain=True)

    def _refusal(self, owner: Owner | None) -> UserError:
        gone = ""
        if owner is not None and owner.kernel != self.own.kernel:
            gone = f". Where {owner.host} is gone for good, remove {self._file}"
        return UserError(
            f"{owner or 'a process that has just begun'} is writing here, so this one, {self.own.pid} on "
            f"{self.own.host}, can't. Wait until that has ended, end it, or give another folder{gone}",
            self._what,
        )

    def _names_us(self) -> bool:
        owner, _ = _read(self._file)
        return owner is not None and owner.token == self.own.token

    def _beat(self) -> None:
        while not self._stop.wait(self._periods.beat):
            with suppress(OSError, _Held):  # the file system is away for a moment, or the next beat tells
                self._check_folder()
                try:
                    if (owner := _read(self._file)[0]) is not None and owner.token != self.own.token:
                        _end(f"{self._what}: {owner} has taken it over: this process has lost it, and ends")
                    os.utime(self._file)
                except FileNotFoundError:
                    self._replace()

    def _check_folder(self) -> None:
        """End where the folder is gone, or another one has its name: what is written would lie in both."""
        try:
            same = os.path.samestat(os.stat(self._file.parent), self._folder)
        except FileNotFoundError:
            same = False
        if not same:
            _end(f"{self._what}: it was removed or renamed while this process was writing there")

    def _replace(self) -> None:
        """Make the file again that someone has removed."""
        descriptor = self._attempt()
        os.dup2(descriptor, self.descriptor, inheritable=False)
        os.close(descriptor)


def _read(file: Path) -> tuple[Owner | None, int]:
    """Return the owner, and when the file was touched; opened anew, since NFS asks the server then."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        touched, content = os.fstat(descriptor).st_mtime_ns, os.read(descriptor, _LONGEST)
    finally:
        os.close(descriptor)
    try:
        return Owner(**json.loads(content)), touched
    except (ValueError, TypeError, RecursionError):  # not written yet, or not whole
        return None, touched


def _flock(descriptor: int, operation: int) -> bool | None:
    """Return whether the kernel gives the lock; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCKS:
            raise
        return None
    return True


def _kernel() -> str:
    """Name the kernel that runs here: containers have host names of their own, and a host is restarted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _end(problem: str) -> None:
    """End this process, whose main thread is at work."""
    with suppress(OSError):
        os.write(2, f"error: {one_line(problem)}\n".encode())
    os._exit(EXIT_USER_ERROR)


def _close_in_child() -> None:
    # A forked child that outlives its parent would hold the parent's lock.
    for lock in _held:
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
