"""What a run ends with on the terminal: only what its folder holds is named."""

from pathlib import Path

import pytest

from dga_scale.run_folder import RunFolder
from dga_scale.train.finish import print_summary


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
