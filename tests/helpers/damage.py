"""Ways in which a file gets lost or changed on a disk."""

import random
from collections.abc import Callable
from pathlib import Path


def truncate(path: Path) -> None:
    """Half of it is left."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last_byte(path: Path) -> None:
    """As a copy that ended early."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, position: float = 0.5, bit: int = 0) -> None:
    """One bit of the byte at ``position`` (0 to 1) is the other one."""
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * position), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def flip_at_random(path: Path) -> None:
    """One bit anywhere; where, depends on the file's name only."""
    draws = random.Random(path.name)
    flip(path, draws.random(), draws.randrange(8))


def empty(path: Path) -> None:
    """Nothing is left."""
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "truncated": truncate,
    "last byte cut": cut_last_byte,
    "empty": empty,
    "first byte flipped": lambda path: flip(path, 0.0),
    "middle byte flipped": flip,
    "last byte flipped": lambda path: flip(path, 1.0),
    "a byte flipped": flip_at_random,
}


def every_damage(folder: Path) -> list[tuple[str, str]]:
    """Each file below a folder, by its name relative to it, with each damage."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files
    return [(file, damage) for file in files for damage in DAMAGES]
