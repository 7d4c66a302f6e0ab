"""Folders taken away from a run, or odd from the start: one line, and an exit code that is not 0."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from dga_scale.config.parsing import read_config
from dga_scale.errors import run_main
from dga_scale.launch.world import join_cluster
from dga_scale.train.callbacks import Callback, RunState
from dga_scale.train.loop import train
from tests.helpers.pictures import no_pictures
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments


class Taking(Callback):
    """Takes something of the run's folder away after its first step."""

    def __init__(self, what: str) -> None:
        self._what = what

    def after_step(self, run: RunState) -> None:
        folder = run.inputs.folder.path
        if run.step == 1 and self._what == "renamed":
            folder.rename(folder.with_name("elsewhere"))
        elif run.step == 1 and self._what == "removed":
            shutil.rmtree(folder)
        elif run.step == 1:
            (folder / self._what).unlink()


def code_and_line(flags: list[str], what: str) -> tuple[int, str]:
    said, callbacks = io.StringIO(), [Taking(what)] if what else []
    with no_pictures(), contextlib.redirect_stderr(said):
        try:
            run_main(lambda: train(read_config(flags), join_cluster(), callbacks))
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()


def mlm(world: SmallWorld, run: Path) -> list[str]:
    return arguments(
        world, run, method="mlm", max_steps=2, max_eval_samples=4, general_eval_corpus=None, loggers="none"
    )


@pytest.mark.parametrize("what", ["removed", "renamed", "log.jsonl"])
def test_a_folder_that_vanishes_ends_the_run_in_one_line(
    what: str, world: SmallWorld, tmp_path: Path
) -> None:
    ((code, said),) = run_ranks(1, code_and_line, mlm(world, tmp_path / "run"), what)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), said
    assert str(tmp_path / "run") in errors[0]
    assert "Traceback" not in said


def test_odd_folders_are_refused_in_one_line(world: SmallWorld, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    (odd / "config.yaml").mkdir(parents=True)
    for folder in (odd, tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "y"):
        ((code, said),) = run_ranks(1, code_and_line, mlm(world, folder), "")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (2, 1), said
        assert str(folder)[:200] in errors[0]
