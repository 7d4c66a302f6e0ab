"""Find the text that inputs name: files, folders, globs and saved datasets, each with its format."""

import codecs
import glob
import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dga_scale.corpus.reading.files import (
    COMPRESSIONS,
    FIRST_BYTES,
    Source,
    check_encoding,
    compression_of,
    files_of,
    first_bytes,
    size_and_time,
)
from dga_scale.corpus.reading.sources import FORMATS
from dga_scale.corpus.shards import MANIFEST, WORK_FOLDER
from dga_scale.errors import UserError, note
from dga_scale.storage.checked_json import read_object

_TEXTS = ("text", "jsonl", "csv", "tsv")
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")
"""The beginning of one array of objects; a line of JSON lines is an object."""

_MANY = 1000
"""The number of inputs from which their finding shows its progress."""

_NAMED = 3
"""The most paths that a line names of those that are not read, for each reason."""


@dataclass
class _LeftOut:
    """What a folder or a pattern holds and is not read, by the reason."""

    empty: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    corpora: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = {
            "empty": self.empty,
            f"of another ending than {', '.join(FORMATS)}": self.unknown,
            "hidden": self.hidden,
            "corpora that were sharded before": self.corpora,
        }
        return "; ".join(
            f"{len(paths)} {kind} ({', '.join(paths[:_NAMED])}{', ...' if len(paths) > _NAMED else ''})"
            for kind, paths in kinds.items()
            if paths
        )


def find_sources(inputs: Collection[str]) -> list[Source]:
    """Expand files, folders and globs into sources, in the order given; inside a folder or glob by path.

    Folders are searched for files of a known ending, links followed. What is not read (hidden, empty or of
    another ending) is told in one line on stderr.

    Raises:
        UserError: An input matches nothing, is an empty file, or has a format that can't be read; a folder
            can't be entered, or a link in it leads nowhere.
    """
    paths: dict[str, bool] = {}  # by path, so that a file named twice is read once: whether it was named
    left_out = _LeftOut()
    for item in inputs:
        for path, named in _expand(item, left_out):
            paths.setdefault(os.path.normpath(path), named)
    looked_at = track(
        paths.items(),
        "looking at inputs",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty() or len(paths) < _MANY,
    )
    sources = [source for path, named in looked_at if (source := _source(Path(path), named, left_out))]
    if not sources:
        raise UserError(f"no text in {' '.join(inputs)}: {left_out}")
    if text := str(left_out):
        note(f"not read: {text}")
    return sources


def _expand(item: str, left_out: _LeftOut) -> Iterator[tuple[str, bool]]:
    """Yield the paths of an input, each with whether it was named itself, not by a folder or a pattern."""
    path = Path(item)
    if _is_saved_dataset(path):
        yield item, True
    elif path.is_dir():
        found = sorted(str(p) for p in _walk(path, left_out))
        if not found:
            raise UserError(
                f"no text files in the folder (searched for {', '.join(FORMATS)}, plain or "
                f"{', '.join(COMPRESSIONS)}){f'; it holds {left_out}' if str(left_out) else ''}. Give text",
                item,
            )
        yield from ((each, False) for each in found)
    elif path.exists():
        yield item, True
    elif path.is_symlink():
        raise UserError(f"a link to {os.readlink(path)}, which is not there. Mend it, or give text", item)
    else:
        matches = _matches(path)
        if not matches:
            kind = "pattern matches no file" if glob.has_magic(item) else "no such file or folder"
            raise UserError(f"{kind}. Give the path of text", item)
        for match in matches:
            yield from ((found, False) for found, _ in _expand(match, left_out))


def _matches(pattern: Path) -> list[str]:
    """Return the sorted paths that match; folders that are there as the pattern begins are no pattern."""
    folder = next((parent for parent in pattern.parents if parent.is_dir()), Path())
    found = glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True)
    return sorted(str(folder / each) for each in found)


def _walk(folder: Path, left_out: _LeftOut) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        here = Path(parent)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if _is_corpus(here):
            left_out.corpora.append(parent)
            folders.clear()
            continue
        if _is_saved_dataset(here):
            folders.clear()
            yield here
            continue
        left_out.hidden += [str(here / name) for name in (*folders, *files) if name.startswith(".")]
        # In one order, so that of two links to one folder the same is followed everywhere.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = here / name
            if not path.exists():
                raise UserError(
                    f"{path} in input folder {folder} is a link to {os.readlink(path)}, which is not there. "
                    "Mend the link or remove it"
                )
            if _format(path) is None:
                left_out.unknown.append(str(path))
            else:
                yield path


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"input folder {error.filename} can't be entered: {error.strerror}") from error


def _is_corpus(path: Path) -> bool:
    """Return whether a folder is the sharder's, finished or begun."""
    return (path / WORK_FOLDER).is_dir() or ((path / MANIFEST).is_file() and any(path.glob("data-*.arrow")))


def _is_saved_dataset(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits")
        names = [str(name) for name in splits] if isinstance(splits, list) else []
        choices = " or ".join(str(path / name) for name in names) or "a folder in it"
        raise UserError(f"input {path} is a saved DatasetDict: name the split to read, {choices}")
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _format(path: Path) -> str | None:
    """Return the format that a file's ending tells; None where it tells none."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return FORMATS.get(inner.suffix.lower())


def _source(path: Path, named: bool, left_out: _LeftOut) -> Source | None:
    """Return the source at a path; None for an empty file that was found, not named."""
    if path.is_dir():
        return Source(str(path), "saved", None, *_state(path))
    if not path.is_file():
        raise UserError(f"input {path} is a pipe or a device. Write it into a file first")
    if not os.access(path, os.R_OK):
        raise UserError(f"input file {path} can't be read: permission denied")
    if {suffix.lower() for suffix in path.suffixes} & _ARCHIVES:
        raise UserError(f"input file {path} is an archive. Unpack it first and name the folder")
    state = size, _, _ = _state(path)
    file_format, start = _format(path) or "datasets", first_bytes(str(path), None)
    compression = compression_of(path, start)
    if compression and size:
        if file_format not in _TEXTS:
            raise UserError(
                f"input file {path}: a compressed {file_format} file can't be read. Decompress it"
            )
        start = first_bytes(str(path), compression)
    if not start:
        if named:
            what = "once decompressed" if size else "(0 bytes)"
            raise UserError(f"input file {path} is empty {what}. Remove it from the inputs")
        left_out.empty.append(str(path))
        return None
    if file_format in _TEXTS:
        check_encoding(str(path), start)
    if file_format == "jsonl" and _ARRAY.match(start.removeprefix(codecs.BOM_UTF8)):
        file_format = "json"
    return Source(str(path), file_format, compression, *state)


def _state(path: Path) -> tuple[int, str, int]:
    """Return the bytes, the fingerprint and the time of the last change of a file, or of a folder's files."""
    files = files_of(path)
    digest = hashlib.sha256()
    for each in files:
        size = each.stat().st_size
        digest.update(os.fsencode(f"{each.relative_to(path)} {size}\n"))
        with open(each, "rb") as file:
            digest.update(file.read(FIRST_BYTES))
            file.seek(max(0, size - FIRST_BYTES))
            digest.update(file.read(FIRST_BYTES))
    size, modified = size_and_time(files)
    return size, digest.hexdigest()[:32], modified
