"""Check that every rank has the same run: settings, code, libraries, data and folder are rank 0's.

Rank 0's are broadcast and compared before any long work. A copy of the code that was not brought up to date
on one node, a YAML file of yesterday or a corpus that was copied half would otherwise end in a hang or,
worse, in a model.
"""

import json
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import dga_scale
from dga_scale.backbone.loading import load_model_config
from dga_scale.config.settings import TrainConfig
from dga_scale.config.user_code import code_hashes
from dga_scale.corpus.tokenizer import tokenizer_hash
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.storage.lock import owned, token_in
from dga_scale.train.inputs import Inputs
from dga_scale.zero.ds_keys import load_ds_config

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "peft")
_SHOWN = 3
_LONGEST_VALUE = 100
_PATIENCE = 30.0
"""Seconds after which a file that rank 0 wrote is taken not to come: network file systems cache folders."""


def check_same_program(config: TrainConfig, cluster: Cluster) -> None:
    """Compare settings (flags and YAML file), the DeepSpeed JSON, our code and the libraries.

    Raises:
        UserError: On every rank, naming the first that differs, its host, the keys and both values.
    """
    _compare(
        cluster,
        lambda: _settings(config) | _code(),
        "start all ranks with the same flags, files and environment",
    )


def check_same_data(inputs: Inputs, cluster: Cluster) -> None:
    """Compare what the settings' paths and names refer to: corpora, tokenizer, model configuration.

    Raises:
        UserError: As above.
    """
    _compare(cluster, lambda: _data(inputs), "put them on a file system that all nodes share, or copy again")


@contextmanager
def own_folder(folder: Path, cluster: Cluster, patience: float = _PATIENCE) -> Iterator[None]:
    """Be the only run that writes ``folder``, the same for all ranks, inside the context; rank 0 locks it.

    Raises:
        UserError: On every rank: another process writes there, or a rank does not see what rank 0 wrote.
    """
    with ExitStack() as held:
        token = cluster.run_on_first(lambda: held.enter_context(owned(folder)))
        host = cluster.broadcast_object(socket.gethostname())

        def check() -> None:
            deadline = time.monotonic() + patience
            while token_in(folder) != token:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--output_dir {folder} is not the folder that rank 0 on {host} writes to: give one "
                        "on a file system that all nodes share"
                    )
                time.sleep(0.1)

        if cluster.world_size > 1:
            cluster.run_on_all(check)
        yield


def _compare(cluster: Cluster, facts: Callable[[], dict[str, Any]], fix: str) -> None:
    if cluster.world_size == 1:
        return
    own = cluster.run_on_all(facts)
    host, first = cluster.broadcast_object((socket.gethostname(), own))

    def compare() -> None:
        keys = [key for key in {**first, **own} if first.get(key) != own.get(key)]
        if keys:
            differing = [f"{key} is {_short(own.get(key))}, there {_short(first.get(key))}" for key in keys]
            more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise UserError(f"not the run of rank 0 on {host}: {'; '.join(differing[:_SHOWN])}{more}: {fix}")

    cluster.run_on_all(compare)


def _settings(config: TrainConfig) -> dict[str, Any]:
    settings = {f"--{name}": value for name, value in config.as_dict().items()}
    if config.run.ds_config:
        settings |= _flat(load_ds_config(config.run.ds_config), f"{config.run.ds_config}: ")
    return settings


def _code() -> dict[str, Any]:
    found = {package: metadata.version(package) for package in _PACKAGES}
    found |= {f"--import {name}": f"code {digest[:12]}" for name, digest in code_hashes().items()}
    found["python"] = platform.python_version()
    found["dga_scale"] = f"{dga_scale.__version__}, code {_digest_of_code()}"
    return found


def _digest_of_code() -> str:
    """Of all our modules as they lie there: finds what was changed and not committed, too."""
    root, digest = Path(dga_scale.__file__).parent, sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _data(inputs: Inputs) -> dict[str, Any]:
    assert inputs.config.model.model is not None
    model = load_model_config(inputs.config.model.model).config.to_json_string(use_diff=False)
    found: dict[str, Any] = {
        f"--model {inputs.config.model.model}'s config.json": _hash(model),
        "the tokenizer": tokenizer_hash(inputs.tokenizer)[:12],
    }
    for corpus in inputs.corpora():
        found[f"corpus {corpus.path}"] = corpus.content_hash[:12]
    return found


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
