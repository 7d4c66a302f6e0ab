"""Write files that are complete or absent: written under another name, synced, then renamed."""

import errno
import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dga_scale.errors import UserError


@contextmanager
def atomic_file(path: Path, scratch: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at ``path`` only when the block has ended without an error.

    Until then it lies in ``scratch`` (same file system) under a name that no other process uses, so several
    processes may write the same ``path`` at once: the last rename wins.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f"{path.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Without this a power failure may undo the rename although a later one was kept.
    sync(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file that one process writes, in one step: readers see the old or the new content, whole.

    Until then the content lies in ``path`` with ``.tmp`` appended, which a resumed run removes.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the name that was asked for
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, scratch: Path) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_file(path, scratch) as file:
        # A file's name may hold bytes that are no text; their escapes are JSON's too.
        file.write(text.encode("utf-8", "backslashreplace"))


def write_array(path: Path, array: np.ndarray, scratch: Path) -> None:
    """Write ``array`` as .npy, atomically.

    The bytes are made in memory first: on a full disk ``np.save`` raises an OSError without its errno.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with atomic_file(path, scratch) as file:
        file.write(buffer.getbuffer())


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that can't be written into a ``UserError`` naming ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(folder)).free / 1e6
            raise UserError(
                f"the disk of {folder} is full ({free:.1f} MB free): {error.strerror}. Finished work is "
                "kept: free disk space and run the same command again to continue"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"it can't be written: {error.strerror}. Give another folder, or change its permissions",
                error.filename or folder,
            ) from error
        raise


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
