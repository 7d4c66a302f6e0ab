"""The companions of a checkpoint: files that its run made once, on the weights that it started from.

Importance, the warmed-up head, the experts' structure and the Fisher lie in the run's folder, beside
``checkpoints/``. What was measured on the base model can't be measured on an adapted one, so a checkpoint's
manifest names and hashes those that its run has, and a run that resumes from it uses them or none: in
another folder it gets copies.
"""

import os
import shutil
from pathlib import Path

from dga_scale.checkpoint.store import MANIFEST, Checkpoint, inspect
from dga_scale.errors import UserError
from dga_scale.run_folder import RunFolder
from dga_scale.storage.atomic import sync
from dga_scale.storage.safetensors_stream import FileRecord, record_of


def companion_names(folder: RunFolder) -> list[str]:
    """Name the files that go with a run's checkpoints, as far as it has them, relative to its folder.

    The Fisher, a folder, is named by its manifest, which hashes the others.
    """
    paths = (folder.importance, folder.head, folder.experts, folder.fisher / MANIFEST)
    return [str(path.relative_to(folder.path)) for path in paths]


def record_companions(folder: RunFolder) -> dict[str, FileRecord]:
    """Hash the companions of a run's checkpoints as they lie in its folder now."""
    names = companion_names(folder)
    return {name: record_of(folder.path / name) for name in names if (folder.path / name).is_file()}


def bring_companions(checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Bring the companions of the checkpoint that a run resumes from into its folder; one process does.

    Files of another run are copied, each appears whole or not at all.

    Raises:
        UserError: A file is missing, or is not the one that the checkpoint was written beside; or the run has
            another one.
        OSError: The disk is full.

    """
    own = checkpoint.lies_in(folder.path)
    for name, record in checkpoint.companions.items():
        source, target = checkpoint.run_dir / name, folder.path / name
        _check(source, record, checkpoint)
        if own:
            continue
        if target.is_file():
            if record_of(target) != record:
                raise UserError(
                    f"{target} is not {source}, which {checkpoint.path} was trained with: give a new "
                    "--output_dir, or remove the file"
                )
        elif source.name == MANIFEST:
            _copy_folder(source.parent, target.parent, checkpoint)
        else:
            temporary = target.with_name(target.name + ".tmp")
            _copy(source, temporary, record, checkpoint)
            os.replace(temporary, target)
    sync(folder.path)


def _copy_folder(source: Path, target: Path, checkpoint: Checkpoint) -> None:
    found, problem = inspect(source)
    if found is None:
        raise UserError(f"{problem}. {checkpoint.path} was trained with it: {_FIX}")
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, record in (found.files | {MANIFEST: record_of(source / MANIFEST)}).items():
        _copy(source / name, temporary / name, record, checkpoint)
    sync(temporary)
    os.replace(temporary, target)


def _copy(source: Path, target: Path, record: FileRecord, checkpoint: Checkpoint) -> None:
    shutil.copyfile(source, target)
    sync(target)
    _check(target, record, checkpoint, source)


def _check(path: Path, record: FileRecord, checkpoint: Checkpoint, origin: Path | None = None) -> None:
    """Compare a file with the checkpoint's record of it; ``origin`` is the file that it is a copy of."""
    origin = origin or path
    if not path.is_file():
        raise UserError(f"{origin} is missing, and {checkpoint.path} was trained with it: {_FIX}")
    if record_of(path) != record:
        raise UserError(
            f"{origin} is not the file that {checkpoint.path} was trained with (its sha256 differs): {_FIX}"
        )


_FIX = "restore it, or start anew in another --output_dir without --resume"
