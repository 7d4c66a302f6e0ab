"""The same command twice: the second ends at once, and the first as if there had been no second."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from dga_scale.config.parsing import read_config
from dga_scale.launch.world import join_cluster
from dga_scale.storage.lock import LOCK_FILE, owned
from dga_scale.train import cli
from dga_scale.train.callbacks import Callback, RunState
from dga_scale.train.loop import train
from tests.helpers.flags import changed
from tests.helpers.forks import Launch, launch
from tests.helpers.pictures import no_pictures
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, losses

PAUSE = 3


class Pause(Callback):
    """After a step, a rank says that it is there and waits."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def after_step(self, run: RunState) -> None:
        if run.step == PAUSE:
            (self.run.parent / f"pausing-{run.trainer.cluster.rank}").touch()
            while not (self.run.parent / "go").exists():
                time.sleep(0.02)


def train_with_a_pause(flags: list[str], run: Path) -> int:
    with no_pictures():
        return train(read_config(flags), join_cluster(), [Pause(run)])


def train_as_command(flags: list[str]) -> None:
    cli.end_rank = sys.exit
    sys.argv = ["dga_train.py", *flags]
    with no_pictures():
        cli.train_command()


def wait_for(launched: Launch, *files: Path) -> None:
    while not all(file.exists() for file in files):
        assert not launched.ended(0.05), launched.output(0)


def content(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def figures(run: Path) -> dict[str, Any]:
    """The summary, without what differs from run to run."""
    summary = json.loads((run / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "seconds_per_step"}


def test_the_second_of_two_launches_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = arguments(world, run, method="mlm", save_total_limit=1, async_save="false")
    first = launch(2, train_with_a_pause, flags, run)
    wait_for(first, tmp_path / "pausing-0", tmp_path / "pausing-1")
    before = content(run)
    assert before.keys() >= {LOCK_FILE, "log.jsonl", "checkpoints/step-000002/manifest.json"}
    second = launch(2, train_as_command, flags)
    assert second.wait() == [2, 2]
    said = second.output(0)
    assert f": process {first.pids[0]} on " in said
    assert said.count("error: ") == said.count(f"error: {run}: ") == 1
    assert "Traceback" not in said + second.output(1)
    other = launch(2, train_as_command, changed(flags, "--learning_rate=0.5"))
    assert other.wait() == [2, 2]
    assert "holds another run: learning_rate" in other.output(0)
    assert content(run) == before
    (tmp_path / "go").touch()
    assert first.wait() == [0, 0]
    assert not (run / LOCK_FILE).exists()

    alone = tmp_path / "alone"
    assert launch(2, train_with_a_pause, changed(flags, f"--output_dir={alone}"), alone).wait() == [0, 0]
    assert losses(run) == losses(alone)
    assert figures(run) == figures(alone)


def test_a_sequence_owns_its_folder_and_those_of_its_runs(world: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [flag for flag in arguments(world, run, method="mlm") if not flag.startswith("--corpus")]
    flags += ["--corpus", str(world.corpus), str(world.general_corpus)]
    for folder in (run, run / f"1-{world.corpus.name}"):
        with owned(folder):
            second = launch(1, train_as_command, flags)
            assert second.wait() == [2]
            assert re.search(rf"^error: {folder}: process {os.getpid()} on ", second.output(0), re.MULTILINE)
            assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
