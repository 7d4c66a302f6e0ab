"""Making the demo ready: each step once, whole or not at all, by one process at a time."""

import fcntl
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.quickstart import demo, prepare
from dga_scale.quickstart.text import docstrings
from tests.helpers.ranks import REPOSITORY, without_gloo

pytestmark = pytest.mark.slow


def complete(folder: Path) -> Path:
    """A demo folder in which every step is done."""
    for name in ("encoder", "text", "base"):
        (folder / name).mkdir(parents=True)
    (folder / "base" / "report.html").touch()
    for name in ("domain", "domain_heldout", "general", "general_heldout"):
        (folder / "corpora" / name).mkdir(parents=True)
        (folder / "corpora" / name / "manifest.json").touch()
    return folder


def test_defaults_are_settings_of_a_run_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # nothing can be started
    settings = prepare.defaults(complete(tmp_path / "demo"))
    assert set(settings) <= read_config(["--ds_config=x.json"]).as_dict().keys()
    assert settings["model"] == str(tmp_path / "demo" / "base" / "model")
    assert settings["corpus"] != settings["eval_corpus"] != settings["general_eval_corpus"]
    assert capsys.readouterr().out == ""


def test_a_step_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "text"

    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare._once(target, "collect", broken)
    assert not target.exists()
    prepare._once(target, "collect", lambda folder: (folder / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]
    prepare._once(target, "collect", broken)  # complete: not called


def test_one_process_at_a_time(tmp_path: Path) -> None:
    inside: list[str] = []
    together: list[int] = []

    def work() -> None:
        with prepare._locked(tmp_path):
            inside.append("in")
            together.append(len(inside))
            threading.Event().wait(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1, 1]


def test_where_the_demo_is_killed_its_command_keeps_the_folder(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def work() -> None:
        with prepare._locked(tmp_path / "demo") as lock:
            prepare.run_command("sh", "-c", f"echo > {fifo}; read line < {fifo}", lock=lock)

    demo = multiprocessing.get_context("fork").Process(target=work)
    demo.start()
    fifo.read_text()  # the command is there
    demo.kill()
    demo.join()
    with open(tmp_path / "demo" / ".lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fifo.write_text("\n")
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the command has ended


def test_encoder_is_the_published_one(tmp_path: Path) -> None:
    prepare._once(tmp_path / "encoder", "verify", prepare._link_encoder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "encoder").iterdir()
    }


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(prepare, "package_folder", lambda name: tmp_path)
    with pytest.raises(UserError, match=r"is not the published all-MiniLM-L6-v2.*pip install --force"):
        prepare._once(tmp_path / "encoder", "verify", prepare._link_encoder)
    assert not (tmp_path / "encoder").exists()


def test_commands_are_shown_and_do_not_take_themselves_for_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    program = "import os, sys; print(sorted(k for k in os.environ if 'RANK' in k or k in ('WORLD_SIZE', "
    program += "'MASTER_PORT', 'SLURM_PROCID')), os.environ['EXTRA'], sys.prefix)"
    prepare.run_command("python", "-c", program, environment={"EXTRA": "given"})
    shown = capfd.readouterr().out
    assert shown.startswith("\n$ python -c 'import os")
    assert shown.endswith(f"[] given {sys.prefix}\n")  # the Python beside this one, not the system's


def test_a_command_that_fails_ends_the_demo() -> None:
    with pytest.raises(UserError, match=r"`python` ended with exit code 3"):
        prepare.run_command("python", "-c", "raise SystemExit(3)")


def test_an_installed_copy_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "site-packages" / "dga_scale"
    copy.mkdir(parents=True)
    monkeypatch.setattr(prepare.dga_scale, "__file__", str(copy / "__init__.py"))
    with pytest.raises(UserError, match="only a checkout of the repository"):
        prepare.repository()


def test_the_demo_end_to_end_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real encoder, text of one library, a few steps; the second time it is done in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "docstrings", lambda: docstrings(["networkx"]))
    small = {"max_steps": 2, "max_eval_samples": 8, "global_batch_size": 4}
    monkeypatch.setattr(prepare, "BASE_SETTINGS", prepare.BASE_SETTINGS | small | {"head_warmup_steps": 1})
    monkeypatch.setattr(prepare, "RUN_SETTINGS", prepare.RUN_SETTINGS | small | {"importance_samples": 4})
    assert demo.demo() == 0
    shown = capfd.readouterr().out
    assert "launchers/dga_train.py --ds_config" in shown
    assert "ds_configs/zero2.json" in shown
    for line in shown.splitlines()[-7:-1]:
        place = line.split(":", 1)[1].split()
        assert (Path(place[-1]) if place[0] == "tensorboard" else Path(place[0])).exists(), line
    assert "general: Wikipedia" in shown
    bare = [sys.executable, str(REPOSITORY / "launchers" / "dga_train.py")]
    flags = {"ds_config": REPOSITORY / "ds_configs" / "zero2.json", **small, "importance_samples": 4}
    flags |= {"learning_rate": prepare.RUN_SETTINGS["learning_rate"]}
    again = subprocess.run(
        [*bare, *(f"--{name}={value}" for name, value in flags.items())],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    ranks, demo_line = without_gloo(again.stdout).splitlines()[:2]
    assert ranks == "1 rank on 1 node, started by python"
    assert "built-in demo" in demo_line
    assert "--model MODEL --corpus DIR" in demo_line
    monkeypatch.setenv("PATH", "")  # nothing can be started any more
    assert demo.demo() == 0
    assert "complete already" in capfd.readouterr().out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("no-such-python", "missing, or not Python 3.10 to 3.13"),
        ("./old-python", "missing, or not Python 3.10 to 3.13"),
        ("./bare-python", "can't make virtual environments. On Debian and Ubuntu: apt-get"),
    ],
)  # fmt: skip
def test_make_says_what_python_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, said: str
) -> None:
    scripts = {
        "old-python": "exit 1",  # its version check
        "bare-python": 'case "$2" in *ensurepip*) exit 1;; esac',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    command = ["make", "-f", str(REPOSITORY / "Makefile"), "test", f"PYTHON={python}"]
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # the variables of a make that has started the tests
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert said in found.stdout
    assert not (tmp_path / ".venv").exists()
