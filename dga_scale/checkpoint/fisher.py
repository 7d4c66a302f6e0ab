"""The Fisher of a run on disk: written by the ranks that measured it, loaded by any number of them.

The folder ``fisher`` has files as a checkpoint's: ``rank-00000.safetensors``, ... hold fragments of
parameters and say where each belongs. It is there whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dga_scale.checkpoint.store import verified, write_manifest
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.weight_regularisation import FragmentKey, key_of
from dga_scale.run_folder import write_text
from dga_scale.storage.checked_json import read_object
from dga_scale.storage.safetensors_stream import (
    Entry,
    FileRecord,
    SegmentReader,
    record_of,
    write_safetensors,
)

MEASURED = "measured.json"


def save_fisher(
    folder: Path,
    values: Mapping[FragmentKey, Tensor],
    fragments: Sequence[Fragment],
    cluster: Cluster,
    copies: int = 1,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write F of all fragments; every rank has to call it.

    Args:
        folder: The folder to be made, on a file system that all ranks share.
        values: F of this rank's fragments, (n,) fp32 each.
        fragments: This rank's fragments.
        cluster: The ranks.
        copies: The number of ranks that hold each entry (ZeRO-0: all of them; else 1).
        measured: What ``read_measured`` returns of it, as plain data.

    Raises:
        UserError: Any rank could not write; raised on all.

    """
    temporary = folder.with_name(folder.name + ".tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> dict[str, FileRecord]:
        if copies > 1 and cluster.rank > 0:
            return {}
        measured = [f for f in fragments if key_of(f) in values]
        entries = [_entry(f.name, values[key_of(f)]) for f in measured]
        segments = json.dumps({f.name: (f.start, f.shape) for f in measured})
        path = temporary / f"rank-{cluster.rank:05d}.safetensors"
        try:
            return {path.name: write_safetensors(path, entries, {"segments": segments})}
        except OSError as error:
            raise UserError(
                f"the Fisher {path} could not be written: {error.strerror or error}. Free disk space, or "
                "give an --output_dir that all nodes share, then start again"
            ) from None

    def publish() -> None:
        write_text(temporary / MEASURED, json.dumps(measured or {}, indent=2) + "\n")
        files[MEASURED] = record_of(temporary / MEASURED)
        write_manifest(temporary, files, 0, cluster.world_size)
        shutil.rmtree(folder, ignore_errors=True)  # of other weights
        os.replace(temporary, folder)

    cluster.run_on_first(prepare)
    parts = cluster.all_gather_object(cluster.run_on_all(write))
    files = {name: record for part in parts for name, record in part.items()}
    cluster.run_on_first(publish)


def _entry(name: str, values: Tensor) -> Entry:
    return Entry(name, torch.float32, tuple(values.shape), lambda: values)


def read_measured(folder: Path) -> dict[str, Any]:
    """Return what ``save_fisher`` was told about the Fisher; empty where there is none that can be read."""
    try:
        return read_object(folder / MEASURED)
    except UserError:
        return {}


def load_fisher(folder: Path, fragments: Sequence[Fragment], cluster: Cluster) -> dict[FragmentKey, Tensor]:
    """Load F of these fragments, whatever ranks and ZeRO stage wrote it: (n,) fp32, on their devices.

    Every rank has to call it.

    Raises:
        UserError: F is damaged or does not hold them all; raised on all ranks.

    """
    found, problem = verified(folder, cluster)
    if found is None:
        raise UserError(f"the Fisher: {problem}. Restore it, or remove {folder} to measure it again")
    return cluster.run_on_all(lambda: _read(folder, fragments))


def _read(folder: Path, fragments: Sequence[Fragment]) -> dict[FragmentKey, Tensor]:
    values = {}
    with SegmentReader(sorted(folder.glob("rank-*.safetensors"))) as reader:
        for fragment in fragments:
            own = torch.empty_like(fragment.values, dtype=torch.float32)
            stored = reader.stored.get(fragment.name)
            known = stored is not None and stored.shape == fragment.shape
            if not known or reader.read(fragment.name, fragment.start, own) < own.numel():
                raise UserError(
                    f"{folder} lacks the Fisher of {fragment.name} {fragment.shape}: it is of another "
                    "model, or files are missing. Restore them, or start anew in another --output_dir"
                )
            values[key_of(fragment)] = own
    return values
