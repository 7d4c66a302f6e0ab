"""Small safetensors files with a checksum: a flipped byte is found before it is used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dga_scale.storage.atomic import replace_file
from dga_scale.storage.checked_json import CHECKSUM


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum in its metadata, whole or not at all, and sync it.

    Raises:
        OSError: The disk is full or the folder is gone.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(kept, {**metadata, CHECKSUM: _checksum_of_tensors(kept, metadata)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of ``save_tensors``: the tensors, and the metadata without the checksum.

    Raises:
        OSError, SafetensorError: There is no such file, or it can't be read.
        ValueError: The content is not what was written, or its checksum is missing.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if CHECKSUM not in metadata:
        raise ValueError("it has no checksum")
    if metadata.pop(CHECKSUM) != _checksum_of_tensors(tensors, metadata):
        raise ValueError("its content does not have its checksum")
    return tensors, metadata


def _checksum_of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
