"""What the demo shows at its end: only what its run holds is named."""

import json
from pathlib import Path

import pytest

from dga_scale.quickstart.demo import show
from dga_scale.run_folder import RunFolder

LOSSES = {"before": 4.0, "after": 3.0}


@pytest.mark.parametrize("with_board", [True, False])
def test_tensorboard_is_named_where_it_was_written(
    with_board: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "tensorboard" if with_board else run).mkdir(parents=True)
    summary = {"tokens": 1000, "domain_loss": LOSSES, "general_loss": LOSSES}
    (run / "summary.json").write_text(json.dumps(summary))
    show(tmp_path, RunFolder(run))
    printed = capsys.readouterr().out
    assert ("--logdir" in printed) == with_board
    assert f"report: {run / 'report.html'}" in printed
    assert f"log: {run / 'log.jsonl'}" in printed
