"""The environment of a run: versions, commit, devices, for readers of environment.json."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dga_scale
from dga_scale.storage.atomic import replace_file

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "safetensors",
    "mpi4py",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
)
"""The only environment variables that are recorded: others may hold secrets."""


def describe_environment(*, launcher: str, devices: Sequence[str], hosts: Sequence[str]) -> dict[str, Any]:
    """Describe the environment of this run, which its settings do not name, as plain data.

    Args:
        launcher: The program that started the ranks.
        devices: The name of each rank's device, in rank order (see :func:`device_name`).
        hosts: The host name of each rank; only their number is recorded.
    """
    return {
        "dga_scale": dga_scale.__version__,
        "git_commit": git_commit(Path(dga_scale.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "launcher": launcher,
        "world_size": len(devices),
        "hosts": len(set(hosts)),
        "devices": {name: devices.count(name) for name in dict.fromkeys(devices)},
        "torch_threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def write_environment(path: Path, environment: dict[str, Any]) -> None:
    """Write the result of ``describe_environment`` as JSON."""
    replace_file(path, (json.dumps(environment, indent=2) + "\n").encode())


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or of the processor for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit(folder: Path) -> str | None:
    """Return the commit of ``folder``'s checkout, ``-dirty`` if changed; None for an installed copy."""
    # A copy installed into an environment may lie inside a checkout of something else.
    if not _git(folder, "ls-files", "__init__.py"):
        return None
    return _git(folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
