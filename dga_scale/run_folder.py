"""The folder of a run: the names of its files, and whether a run may resume in it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dga_scale.config.comparison import Difference, corpora_of, differences
from dga_scale.config.declaration import shown
from dga_scale.config.methods import known_settings
from dga_scale.config.settings import TrainConfig
from dga_scale.config.yaml_file import read_yaml
from dga_scale.corpus.shards import read_manifest
from dga_scale.errors import UserError
from dga_scale.storage.atomic import replace_file
from dga_scale.storage.lock import LOCK_FILE
from dga_scale.storage.typed_json import read_typed

LOG_FILE = "log.jsonl"
FIRST_FILES = ("config.yaml.tmp", "corpora.json", "corpora.json.tmp", LOCK_FILE)
"""What a run that was killed right at its start may have left."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files (docs/run_folder.md)."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def corpora(self) -> Path:
        """The file with the hashes of config.yaml's corpora, by which a copy elsewhere is recognised."""
        return self.path / "corpora.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def importance(self) -> Path:
        return self.path / "importance.safetensors"

    @property
    def importance_after(self) -> Path:
        return self.path / "importance-after.safetensors"

    @property
    def head(self) -> Path:
        return self.path / "head.safetensors"

    @property
    def experts(self) -> Path:
        return self.path / "experts.json"

    @property
    def fisher(self) -> Path:
        return self.path / "fisher"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def begun(self) -> bool:
        """Whether anything was measured or trained here, which other settings would not have given.

        A run that was refused after it had written its settings has not: it may start again with others.
        """
        if self.log.exists() and self.log.stat().st_size:
            return True
        results = self.importance, self.importance_after, self.head, self.experts, self.fisher
        return any(path.exists() for path in (*results, self.checkpoints, self.model))

    def check(
        self, config: TrainConfig, allowed: Callable[[Difference], bool] = lambda difference: False
    ) -> None:
        """Refuse a folder that this run can't have or resume in; nothing is written.

        Args:
            config: The settings asked for.
            allowed: A function that returns whether a run may resume in spite of a setting that decides its
                numbers.

        Raises:
            UserError: The path is a file, can't be written, is not empty and holds no run, or holds a run
                with other settings (each is named with both values).
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path} is a file. Give a folder.")
        if not _writable(self.path):
            raise UserError(f"--output_dir {self.path} can't be written. Give a folder you own.")
        if not self.config.exists():
            names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            others = [name for name in names if name not in FIRST_FILES]
            if self.checkpoints.is_dir():
                raise UserError(
                    f"--output_dir {self.path} holds a run whose {self.config.name} is gone. Restore that, "
                    f"or go on in a new folder: --resume {self.checkpoints}/step-N --output_dir NEW"
                )
            if others:
                raise UserError(
                    f"--output_dir {self.path} holds other files ({others[0]}, ...) and no run. "
                    "Give a new folder."
                )
            return
        if not self.begun:
            return
        changed = [str(each) for each in self._differences(config) if not allowed(each)]
        if changed:
            raise UserError(
                f"--output_dir {self.path} holds another run: {'; '.join(changed)}. "
                "Give another --output_dir, or the same settings to resume."
            )

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml`` and ``corpora.json``, each whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        hashes = {path: _content_hash(path) for path in corpora_of(config)}
        write_text(self.corpora, json.dumps(hashes, indent=2) + "\n")
        write_text(self.config, yaml.safe_dump(config.as_dict(), sort_keys=False))

    def _differences(self, config: TrainConfig) -> list[Difference]:
        former = read_settings(self.config)
        fix = "Restore it, or remove it."
        hashes = read_typed(self.corpora, dict[str, str | None], fix) if self.corpora.exists() else {}

        def former_hash(path: str) -> str | None:
            return hashes.get(path) or _content_hash(path)

        return differences(former, config, former_hash, _content_hash)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step: readers see the old or the new content, whole."""
    replace_file(path, text.encode(errors="backslashreplace"))  # of a name that is no text


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes ``output`` at the end: whole or not at all.

    Raises:
        UserError: ``output`` exists already, or can't be written.
    """
    if output.exists():
        raise UserError(f"--output {output} exists already. Give a new folder, or remove it.")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.rename(output)
    except OSError as error:
        raise UserError(
            f"--output {output} could not be written: {error.strerror or error}. "
            "Free disk space, or give another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the flat settings of a run's ``config.yaml``; names that this version does not know are kept.

    Raises:
        UserError: It can't be read, or a setting has a value of another type than its declaration says.
    """
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError("damaged: no settings in it. Restore it, or give another folder.", path)
    known = known_settings()
    for name, value in content.items():
        if isinstance(name, str) and name in known:
            words = known[name].wrong_type(value)
        else:
            words = None if isinstance(name, str) and (name != "method" or isinstance(value, str)) else "text"
        if words:
            problem = f"damaged: {name} is {shown(value)}, and must be {words}. Restore the file."
            raise UserError(problem, f"{path}:{lines[(name,)]}")
    return content


def _content_hash(corpus: str) -> str | None:
    """Return the content hash of a corpus folder; None where none can be read."""
    try:
        return read_manifest(Path(corpus)).content_hash
    except UserError:
        return None


def _writable(path: Path) -> bool:
    existing = path
    while not existing.exists():
        existing = existing.parent
    return existing.is_dir() and os.access(existing, os.W_OK)
