"""The identity of a model's weights, whatever its name: a hash of their files' content."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import cached_file

from dga_scale.backbone.loading import load_model_config
from dga_scale.storage.checked_json import read_object
from dga_scale.storage.hub import local_only
from dga_scale.storage.safetensors_stream import record_of

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILES_AT_ONCE = 4


def weights_hash(name_or_path: str, random_init: bool) -> str:
    """Hash the weights that training starts from: sha256 over those of their files.

    Reads them whole, as loading does; weights of a model on the hub are fetched first, as loading does.

    Args:
        name_or_path: The folder, or the name on the Hugging Face hub.
        random_init: Whether the weights are drawn: the architecture's configuration is hashed then, and the
            seed is one of the run's settings.

    """
    if random_init:
        values = load_model_config(name_or_path).config.to_dict()
        values.pop("transformers_version", None)
        parts = [json.dumps(values, sort_keys=True, default=str)]
    else:
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            parts = [record.sha256 for record in threads.map(record_of, _files(name_or_path))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _files(name_or_path: str) -> list[Path]:
    """Find the files that ``from_pretrained`` reads; none where it will find none and refuse."""
    whole = _found(name_or_path, _WEIGHTS)
    if whole is not None:
        return [whole]
    index = _found(name_or_path, _INDEX)
    if index is None:
        return []
    names = set(read_object(index)["weight_map"].values())
    return [path for name in sorted(names) if (path := _found(name_or_path, name)) is not None]


def _found(name_or_path: str, file: str) -> Path | None:
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    try:
        found = cached_file(name_or_path, file, local_files_only=local_only(name_or_path))
    except OSError:
        return None
    return None if found is None else Path(found)
