"""The folder of a run: what lies where, and whether it may be gone on with."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.storage.atomic import replace_file

MAY_CHANGE = frozenset(
    (
        "ds_config", "output_dir", "resume", "dry_run", "logging_steps", "protection_steps", "eval_steps",
        "save_steps", "save_total_limit", "async_save", "check_invariants", "heartbeat_timeout",
        "prefetch_steps", "max_eval_samples", "eval_corpus", "general_eval_corpus", "also_evaluate",
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "split_views",
        "attn_implementation", "max_bad_steps",
    )
)  # fmt: skip
"""Settings that a resumed run may have otherwise than before: none changes which numbers are computed, but
for rounding, and for how the contrast is split where the batch is cut otherwise."""


FIRST_FILES = ("config.yaml.tmp", ".shared")
"""What a run that was killed right at its start may have left."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run (DESIGN.md, 'A run folder')."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

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
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def check(self, config: TrainConfig) -> None:
        """Refuse a folder that this run can't have or go on in; writes nothing.

        Raises:
            UserError: the path is a file, can't be written, is not empty and holds no run, or holds a run
                with other settings (each is named with both values).
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path} is a file. Give a folder.")
        if not _writable(self.path):
            raise UserError(f"--output_dir {self.path} can't be written. Give a folder you own.")
        if not self.config.exists():
            names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            strangers = [name for name in names if name not in FIRST_FILES]
            if strangers:
                raise UserError(
                    f"--output_dir {self.path} holds other files ({strangers[0]}, ...) and no run. "
                    "Give a new folder."
                )
            return
        former = self._former_settings()
        changed = [
            f"{name} was {former.get(name)!r}, is {value!r}"
            for name, value in config.as_dict().items()
            if name not in MAY_CHANGE and former.get(name) != value
        ]
        if changed:
            raise UserError(
                f"--output_dir {self.path} holds another run: {'; '.join(changed)}. "
                "Give another --output_dir, or the same settings to go on."
            )

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml``, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, yaml.safe_dump(config.as_dict(), sort_keys=False))

    def _former_settings(self) -> dict[str, Any]:
        try:
            former = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.config} is damaged ({error}). Restore it or give another folder."
            ) from None
        if not isinstance(former, dict):
            raise UserError(
                f"{self.config} is damaged: no settings in it. Restore it or give another folder."
            )
        return former


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step: readers see the old or the new, never a part."""
    replace_file(path, text.encode())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` on leaving: that appears whole or not at all.

    Raises:
        UserError: ``output`` exists, or can't be written.
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


def _writable(path: Path) -> bool:
    existing = path
    while not existing.exists():
        existing = existing.parent
    return os.access(existing, os.W_OK)
