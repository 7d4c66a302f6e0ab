"""What a run ends with on the terminal: only what its folder holds is named."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dga_scale.run_folder import RunFolder
from dga_scale.train import finish
from dga_scale.train.finish import print_summary


def test_no_report_of_fewer_steps_beside_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the report of an extended run is written, the run does not count as complete."""
    folder = RunFolder(tmp_path)
    folder.report.write_text("of 2 steps")
    folder.summary.write_text('{"steps": 2}')
    for name, value in (("_export", None), ("summarize", {"steps": 4}), ("print_summary", None)):
        monkeypatch.setattr(finish, name, lambda *_, value=value: value)
    seen = []
    monkeypatch.setattr(finish, "write_report", lambda *_: seen.append(folder.report.exists()))
    optimization = SimpleNamespace(max_steps=4)
    finish._write(SimpleNamespace(folder=folder, config=SimpleNamespace(optimization=optimization)), None)
    assert seen == [False]


@pytest.mark.parametrize("with_board", [True, False])
def test_tensorboard_is_named_where_it_was_written(
    with_board: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if with_board:
        (tmp_path / "tensorboard").mkdir()
    print_summary({"method": "mlm", "corpus": "corpora/acl", "steps": 1}, RunFolder(tmp_path))
    printed = capsys.readouterr().out
    assert ("--logdir" in printed) == with_board
    assert f"model: {tmp_path / 'model'}" in printed
    assert f"log: {tmp_path / 'log.jsonl'}" in printed
