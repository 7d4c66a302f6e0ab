"""Folders of checkpoints: committed or absent, verified against their manifest, pruned, chosen for a resume.

A checkpoint is written as ``step-000500.tmp``: every rank writes its file and syncs it; then rank 0 checks
that all files are there, writes ``manifest.json`` (every file with its size and sha256), renames the folder,
and points ``latest`` at it. A process killed at any moment leaves the older checkpoints as they were.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dga_scale.config.declaration import shown
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.run_folder import RunFolder, write_text
from dga_scale.storage.atomic import sync
from dga_scale.storage.checked_json import checked, load_object, with_checksum
from dga_scale.storage.safetensors_stream import FileRecord, record_of
from dga_scale.storage.typed_json import InnerPath, build

FORMAT = 2
MANIFEST, LATEST = "manifest.json", "latest"
MAX_VERIFY_THREADS = 4
"""The most files that a rank verifies at once: more take memory, and the disk is the limit."""
_NAME = re.compile(r"step-([0-9]+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: The checkpoint's folder.
        step: The number of optimizer steps done.
        world_size: The number of ranks that wrote it.
        files: The record of every file in it besides the manifest.
        companions: The files of the run's folder that go with it, by their names there (see ``companions``).
        skipped: One line for each newer checkpoint that can't be used, and why.

    """

    path: Path
    step: int
    world_size: int
    files: dict[str, FileRecord]
    companions: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The folder of the run that wrote the checkpoint."""
        return self.path.resolve().parent.parent

    def lies_in(self, run_dir: Path) -> bool:
        """Return whether the checkpoint is one of this run's own."""
        return self.path.resolve().parent == RunFolder(run_dir.resolve()).checkpoints

    @property
    def shards(self) -> list[Path]:
        return sorted(self.path / name for name in self.files if name.startswith("rank-"))


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of ``manifest.json``, besides its checksum; see ``Checkpoint``."""

    format: int
    step: int
    world_size: int
    files: dict[InnerPath, FileRecord]
    companions: dict[InnerPath, FileRecord]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return RunFolder(run_dir).checkpoints / f"step-{step:06d}"


def commit(
    temporary: Path,
    final: Path,
    files: dict[str, FileRecord],
    step: int,
    world_size: int,
    companions: Mapping[str, FileRecord] | None = None,
) -> None:
    """Turn a written folder into the checkpoint ``final``, which ``companions`` go with; one process does.

    Raises:
        UserError: A file that another rank wrote is not there.
        OSError: The disk is full, or the folder can't be written.
    """
    for name, record in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise UserError(
                f"checkpoint {final}: rank 0 does not see the {record.bytes} bytes of {name} that another "
                "rank wrote. --output_dir has to lie on a file system that all nodes share."
            )
    write_manifest(temporary, files, step, world_size, companions)
    if final.exists():  # a damaged one that this run skipped, or the same step written again
        replaced = final.with_name(final.name + ".old")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    write_text(final.parent / LATEST, final.name + "\n")
    sync(final.parent)


def write_manifest(
    folder: Path,
    files: Mapping[str, FileRecord],
    step: int,
    world_size: int,
    companions: Mapping[str, FileRecord] | None = None,
) -> None:
    """Write the manifest of a folder's files and their companions, as the last file; wait for the disk."""
    named = (dict(sorted(records.items())) for records in (files, companions or {}))
    manifest = dataclasses.asdict(CheckpointManifest(FORMAT, step, world_size, *named))
    write_text(folder / MANIFEST, json.dumps(with_checksum(manifest), indent=2) + "\n")
    sync(folder)


def prune(run_dir: Path, limit: int, step: int) -> None:
    """Remove the oldest checkpoints beyond ``limit``; 0 keeps all.

    ``step`` is that of the newest good one. Later ones, which were skipped, are not counted: they would leave
    no room for it.
    """
    if limit > 0:
        good = [path for path in _folders(RunFolder(run_dir).checkpoints) if _step(path) <= step]
        for path in good[limit:]:
            removed = path.with_name(path.name + ".tmp")
            path.rename(removed)  # a half-removed folder is no checkpoint
            shutil.rmtree(removed)


def remove_leftovers(run_dir: Path) -> None:
    """Remove the temporary files and folders of a run that was killed; one process does, before it resumes.

    A checkpoint that was being replaced, and is not yet, is put back.
    """
    checkpoints = RunFolder(run_dir).checkpoints
    for replaced in checkpoints.glob("step-*.old"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(replaced.with_suffix(""))
    for path in (*run_dir.glob("*.tmp"), *checkpoints.glob("*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _folders(folder: Path) -> list[Path]:
    """List the committed checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if _step(path) >= 0), key=_step, reverse=True)


def _step(path: Path) -> int:
    """Return the step that a folder's name gives; -1 where it is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def newest_complete(run_dir: Path) -> Checkpoint | None:
    """Find the newest checkpoint whose files are all there in their full size; hashes are not compared."""
    for path in _folders(RunFolder(run_dir).checkpoints):
        found, _ = inspect(path)
        if found is not None:
            return found
    return None


def inspect(path: Path) -> tuple[Checkpoint | None, str]:
    """Check a checkpoint without reading its content: return it, or the problem with it."""
    try:
        content = load_object(path / MANIFEST)
        if (version := content.get("format")) != FORMAT:
            return None, f"{path / MANIFEST} has format {shown(version)}, this version reads {FORMAT}"
        manifest: CheckpointManifest = build(CheckpointManifest, checked(content))
        files = manifest.files
        found = Checkpoint(path, manifest.step, manifest.world_size, files, manifest.companions)
    except FileNotFoundError:
        return None, f"{path / MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return None, f"{path / MANIFEST} is damaged ({error})"
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            return None, f"{file} is missing"
        if file.stat().st_size != record.bytes:
            return None, f"{file} has {file.stat().st_size} bytes instead of {record.bytes}"
    return found, ""


def find_resume_point(run_dir: Path, resume: str, cluster: Cluster) -> Checkpoint | None:
    """Choose the checkpoint to resume from; every rank has to call it and gets the same one.

    All content is verified against its hashes, each file by one rank. ``resume``: "auto" takes the newest
    complete one (``skipped`` says which newer ones are damaged), "never" refuses a run that has any, else
    it is the folder of a checkpoint.

    Raises:
        UserError: The chosen checkpoint is incomplete (the message names the file), or all of the run's are.
    """
    if resume not in ("auto", "never"):
        found, problem = verified(Path(resume), cluster)
        if found is None:
            advice = cluster.broadcast_object(_advice(Path(resume), problem))
            raise UserError(f"--resume {resume}: {advice}")
        return found
    if resume == "auto":
        return newest_verified(run_dir, cluster)
    folders = cluster.broadcast_object(_folders(RunFolder(run_dir).checkpoints))
    if folders:
        raise UserError(
            f"{run_dir} already holds {folders[0].name}. Give a new --output_dir, or --resume auto to resume."
        )
    return None


def _advice(path: Path, problem: str) -> str:
    """Say what is wrong with a path that is no complete checkpoint, and what to give instead."""
    if not path.is_dir():
        return "no such folder. Give auto, never, or the folder of a checkpoint: RUN/checkpoints/step-N."
    for folder in (path, RunFolder(path).checkpoints):
        if newest := next(iter(_folders(folder)), None):
            return f"no checkpoint, but a folder of some. Give one of them: {newest}."
    return f"{problem}. Give the folder of a complete checkpoint."


def newest_verified(run_dir: Path, cluster: Cluster) -> Checkpoint | None:
    """Find the newest checkpoint whose whole content is as it was written; every rank has to call it.

    Raises:
        UserError: There are checkpoints, but none is complete.
    """
    folders = cluster.broadcast_object(_folders(RunFolder(run_dir).checkpoints))
    skipped: list[str] = []
    for path in folders:
        found, problem = verified(path, cluster)
        if found is not None:
            return dataclasses.replace(found, skipped=tuple(skipped))
        skipped.append(problem)
    if skipped:
        raise UserError(
            f"no checkpoint in {RunFolder(run_dir).checkpoints} is complete: {'; '.join(skipped)}. "
            "Restore a file, or remove the folder to start from the beginning."
        )
    return None


def verified(path: Path, cluster: Cluster) -> tuple[Checkpoint | None, str]:
    """Compare all hashes of a checkpoint, its files spread over the ranks: return it, or the problem."""
    found, problem = cluster.broadcast_object(inspect(path) if cluster.rank == 0 else (None, ""))
    if found is None:
        return None, problem
    problems = [p for part in cluster.all_gather_object(_damaged(found, cluster)) for p in part]
    return (None, problems[0]) if problems else (found, "")


def _damaged(checkpoint: Checkpoint, cluster: Cluster) -> list[str]:
    """List the problems of this rank's share of the files: of the large ones, each rank has as many."""
    ordered = sorted(checkpoint.files, key=lambda name: (-checkpoint.files[name].bytes, name))

    def problem(name: str) -> str | None:
        file = checkpoint.path / name
        try:
            if record_of(file) == checkpoint.files[name]:
                return None
            return f"{file} does not have the content that was written (sha256)"
        except OSError as error:
            return f"{file}: {error.strerror}"

    cores = torch.get_num_threads()  # this rank's share of its machine's (``threads.share_cores``)
    with ThreadPoolExecutor(min(cores, MAX_VERIFY_THREADS)) as threads:
        found = threads.map(problem, ordered[cluster.rank :: cluster.world_size])
    return [each for each in found if each is not None]
