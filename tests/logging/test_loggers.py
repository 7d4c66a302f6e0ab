"""A logger of one's own through the interface, in a real run; the null logger; what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster, single_process
from dga_scale.logging.json_lines import read_log
from dga_scale.logging.logger import Logger, Numbers
from dga_scale.logging.loggers import LOGGERS
from dga_scale.logging.run_log import open_log, silent_log
from dga_scale.train.loop import train
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments

STEPS = 3


class Notebook(Logger):
    """Writes each call to a file, as a logger of another service would send it off."""

    def _note(self, *call: Any) -> None:
        with open(self.run.folder / "notebook.jsonl", "a") as file:
            file.write(json.dumps(call) + "\n")

    def step(self, step: int, numbers: Numbers) -> None:
        self._note("step", step, dict(numbers))

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._note("event", step, {"event": name, **values})

    def settings(self, settings: Mapping[str, Any]) -> None:
        self._note("settings", 0, settings["max_steps"])

    def outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        self._note("outcome", self.run.total_steps, dict(figures))

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self._note("figure", step, [name, len(figure.axes) > 0])

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self._note("histogram", step, [name, list(values.shape)])

    def close(self) -> None:
        self._note("close", 0, None)


def run_with_notebook(flags: list[str]) -> int:
    LOGGERS["notebook"] = Notebook
    try:
        return train(read_config([*flags, "--loggers", "notebook"]), join_cluster())
    finally:
        del LOGGERS["notebook"]


def test_a_new_logger_gets_all_that_log_jsonl_has(world: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = arguments(world, run, soft_mask="update", max_steps=STEPS, max_eval_samples=16)
    assert run_ranks(2, run_with_notebook, flags) == [0, 0]
    notes = [json.loads(line) for line in (run / "notebook.jsonl").read_text().splitlines()]
    logged = [{"step": step, **value} for what, step, value in notes if what in ("step", "event")]
    assert logged == read_log(run / "log.jsonl")
    others = [(what, step, value) for what, step, value in notes if what not in ("step", "event")]
    assert others[0] == ("settings", 0, STEPS)
    assert ("figure", 0, ["importance/heads", True]) in others
    assert ("histogram", 0, ["soft_mask/heads", [2, 4]]) in others
    assert ("figure", STEPS, ["protection/heads", True]) in others
    outcome = next(value for what, _, value in others if what == "outcome")
    assert outcome["domain_loss"] == [r for r in logged if r.get("event") == "evaluation"][-1]["domain_loss"]
    assert others[-1][0] == "close"
    assert not (run / "tensorboard").exists(), "the loggers named take the default's place"


def test_no_logger_leaves_the_log_and_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, 0, 1, loggers=["none"]) as log:
        log.settings({"seed": 1})
        log.step({"step": 1, "loss/total": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert "step 1/1  loss 2.0000" in capsys.readouterr().out


def test_names_in_lines_of_the_log_do_not_reach_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, 0, 1, loggers=["none"]) as log:
        log.print("saved a\x1b[2Jb\rc\nsecond line")
    assert "saved a\\x1b[2Jb\\rc\nsecond line" in capsys.readouterr().out


def test_a_silent_log_says_nothing_and_reads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with silent_log() as log:
        log.print("hello")
        log.event("evaluation", step=0, loss=1.0)
        log.step({"step": 1, "loss/total": torch.empty((), device="meta")})  # it can't be read
        log.importance({"heads": torch.ones(1, 2)}, {"heads": torch.ones(1, 2)})
        assert list(log.track([1, 2], 2, "rows")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_logger_that_does_not_exist_is_refused_before_anything_is_written(
    world: SmallWorld, tmp_path: Path
) -> None:
    flags = [*arguments(world, tmp_path / "run", method="mlm"), "--loggers", "wand"]
    with pytest.raises(UserError, match=r"--loggers wand: .*tensorboard, none"):
        train(read_config(flags), single_process())
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_what_a_run_that_begins_again_writes_once(tmp_path: Path) -> None:
    for loss in (3.0, 4.0):  # killed before its first checkpoint, the second time not
        with open_log(tmp_path, 0, 1, loggers=["tensorboard"]) as log:
            log.event("evaluation", step=0, domain_loss=loss)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in board.Scalars("evaluation/domain_loss")] == [(0, 4.0)]
