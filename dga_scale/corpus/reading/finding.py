"""Find the text that inputs name: files, folders, globs and saved datasets, each with its format."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dga_scale.corpus.reading.sources import COMPRESSIONS, FORMATS, Source
from dga_scale.errors import UserError

_FINGERPRINT_BYTES = 1 << 16


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Expand files, folders and globs into sources, in the order given; inside a folder or glob by path.

    Folders are searched recursively for files of a known ending; hidden files are left out.

    Raises:
        UserError: an input matches nothing, is an empty file, or has a format that can't be read.
    """
    paths: dict[str, None] = {}  # an ordered set: a file named twice is read once
    for item in inputs:
        for path in _expand(item):
            paths.setdefault(os.path.normpath(path))
    return [_source(Path(path)) for path in paths]


def _expand(item: str) -> list[str]:
    path = Path(item)
    if _is_saved_dataset(path):
        return [item]
    if path.is_dir():
        found = sorted(str(p) for p in _walk(path))
        if not found:
            endings = ", ".join(FORMATS)
            raise UserError(
                f"input folder {item} holds no text files (searched for {endings}, plain, .gz or .zst)"
            )
        return found
    if path.exists():
        return [item]
    matches = sorted(glob.glob(item, recursive=True))
    if not matches:
        kind = "pattern matches no file" if glob.has_magic(item) else "no such file or folder"
        raise UserError(f"input {item}: {kind}")
    return [path for match in matches for path in _expand(match)]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if _is_saved_dataset(Path(parent)):
            folders.clear()
            yield Path(parent)
            continue
        for name in files:
            if not name.startswith(".") and _format(Path(name))[0] is not None:
                yield Path(parent, name)


def _is_saved_dataset(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        choices = " or ".join(str(path / split) for split in splits)
        raise UserError(f"input {path} is a saved DatasetDict: name the split to read, {choices}")
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _format(path: Path) -> tuple[str | None, str | None]:
    """Return format and compression by the file's endings; None where unknown."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = Path(path.stem) if compression else path
    return FORMATS.get(inner.suffix.lower()), compression


def _source(path: Path) -> Source:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {_fingerprint(file)}\n".encode())
        return Source(str(path), "saved", None, sum(p.stat().st_size for p in files), digest.hexdigest()[:32])
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"input file {path} is empty (0 bytes). Remove it from the inputs")
    if not os.access(path, os.R_OK):
        raise UserError(f"input file {path} can't be read: permission denied")
    file_format, compression = _format(path)
    if compression and file_format in ("parquet", "datasets"):
        raise UserError(f"input file {path}: a compressed {file_format} file can't be read. Decompress it")
    if file_format == "jsonl" and compression is None and _is_json_array(path):
        file_format = "datasets"
    return Source(str(path), file_format or "datasets", compression, size, _fingerprint(path))


def _is_json_array(path: Path) -> bool:
    """Return whether the file is one array of objects, not an object a line."""
    with open(path, "rb") as file:
        start = file.read(_FINGERPRINT_BYTES).lstrip()
    return re.match(rb"\[\s*(\{|$)", start) is not None


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:32]
