"""What environment.json says, and what it must not."""

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dga_scale.logging.environment import describe_environment, device_name, git_commit, write_environment


def test_environment_names_versions_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOME_API_KEY", "hunter2-secret")
    devices = ["NVIDIA H100", "NVIDIA H100", "NVIDIA A100"]
    described = describe_environment(launcher="srun", devices=devices, hosts=["node-a", "node-a", "node-b"])
    write_environment(tmp_path / "environment.json", described)
    text = (tmp_path / "environment.json").read_text()
    read = json.loads(text)
    assert read == described
    assert read["packages"]["deepspeed"] == metadata.version("deepspeed")
    assert (read["world_size"], read["hosts"]) == (3, 2)
    assert read["devices"] == {"NVIDIA H100": 2, "NVIDIA A100": 1}
    assert read["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(read["variables"]) <= {
        "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "SLURM_JOB_ID",
        "SLURM_JOB_NUM_NODES",
    }  # fmt: skip
    for private in ("hunter2-secret", "node-a", os.path.expanduser("~/")):
        assert private not in text


def test_device_name_of_a_cpu() -> None:
    assert device_name(torch.device("cpu"))


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init")
    assert git_commit(package) is None  # like a copy installed inside a foreign checkout
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(package) == head
    (package / "__init__.py").write_text("changed = 1\n")
    assert git_commit(package) == f"{head}-dirty"


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
