"""The log of a run, read back as a user's tools would: json, TensorBoard's own reader, a pseudo-terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dga_scale.errors import UserError
from dga_scale.logging.json_lines import read_log
from dga_scale.logging.run_log import open_log
from dga_scale.logging.terminal import step_line


def values_at(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss/total": torch.tensor(4.0 / step),
        "loss/mlm": torch.tensor(3.0 / step, dtype=torch.float64),
        "loss/contrastive": 1.0 / step,
        "grad_norm": torch.tensor(0.5),
        "learning_rate": 1e-4,
        "tokens_per_second": 1234.5,
        "data_wait_seconds": 0.001,
        "step_seconds": 0.25,
        "memory_gib": torch.tensor([1.0, 1.5]),
    }


def write_steps(folder: Path, first: int, last: int, **options: Any) -> None:
    with open_log(folder, 0, 12, **options) as log:
        for step in range(first, last + 1):
            log.step(values_at(step))
            if step % 4 == 0:
                log.event("evaluation", step=step, domain_loss=1.0 / step, general_loss=2.0)
                log.event("cse", step=step, kind="layer 1 ffn", share=[0.25, 0.75])


def scalars(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    return board


def test_jsonl_and_tensorboard_hold_the_same(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 12)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "event" not in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert steps[2]["loss/total"] == torch.tensor(4.0 / 3).item()
    assert steps[2]["memory_gib"] == [1.0, 1.5]
    assert [r["step"] for r in records if r.get("event") == "evaluation"] == [4, 8, 12]
    board = scalars(tmp_path)
    for name in ("loss/total", "loss/mlm", "grad_norm", "tokens_per_second", "data_wait_seconds"):
        assert [(e.step, e.value) for e in board.Scalars(name)] == [
            (r["step"], pytest.approx(r[name])) for r in steps
        ]
    assert [e.value for e in board.Scalars("memory_gib/rank1")] == [1.5] * 12
    assert [e.step for e in board.Scalars("evaluation/domain_loss")] == [4, 8, 12]
    assert [(e.step, e.value) for e in board.Scalars("cse/layer 1 ffn/share/1")] == [
        (r["step"], r["share"][1]) for r in records if r.get("event") == "cse"
    ]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path / "run", 1, 12) as log:
        log.settings({"seed": 1})
        log.step(values_at(1))
        log.event("evaluation", step=1, domain_loss=1.0)
        log.print("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("resumed_at", [1, 4, 7])
def test_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path, resumed_at: int) -> None:
    write_steps(tmp_path / "whole", 1, 12)
    write_steps(tmp_path / "cut", 1, 9)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 10, "loss/tot')  # killed in the middle of a line
    write_steps(tmp_path / "cut", resumed_at + 1, 12, completed_steps=resumed_at)
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    for name in ("loss/total", "evaluation/domain_loss"):
        whole, cut = (
            [(e.step, e.value) for e in scalars(tmp_path / run).Scalars(name)] for run in ("whole", "cut")
        )
        assert cut == whole


def test_a_run_that_starts_over_starts_a_new_log(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 1, 2)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_damaged_log_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2 .*restore the file"):
        open_log(tmp_path, 0, 5, completed_steps=3)


class CountingTensor(torch.Tensor):
    """Counts how often a value is fetched to Python: each is a wait for the device."""

    fetched = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__):
            cls.fetched += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_are_read_only_at_logged_steps_and_in_one_transfer(tmp_path: Path) -> None:
    CountingTensor.fetched = 0
    with open_log(tmp_path, 0, 10, logging_steps=4) as log:
        for step in range(1, 11):
            losses = {f"loss/{i}": torch.ones(()).as_subclass(CountingTensor) for i in range(3)}
            before = CountingTensor.fetched
            log.step({"step": step} | losses)
            assert CountingTensor.fetched - before == (1 if log.logs(step) else 0)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 4, 8, 10]


def test_nan_is_null_in_json_and_spelt_out_in_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, 0, 2) as log:
        log.step({"step": 1, "loss/total": torch.tensor(float("nan")), "grad_norm": float("inf")})
    text = (tmp_path / "log.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record == {"step": 1, "loss/total": None, "grad_norm": None}
    assert "loss nan" in capsys.readouterr().out


def test_line_of_a_step_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, 0, 12) as log:
        log.step(values_at(2))
    assert capsys.readouterr().out == (
        "step 2/12  loss 2.0000 (mlm 1.5000, contrastive 0.5000)  grad norm 0.500  lr 1.00e-04  "
        "1,234 tokens/s  data wait 0.001 s  step 0.25 s  memory 1.50 GiB\n"
    )


def test_line_shows_a_value_it_does_not_know() -> None:
    assert step_line(1, 2, {"loss_scale": 65536.0}) == "step 1/2  loss_scale 6.554e+04"


def test_importance_and_protection_become_pictures(tmp_path: Path) -> None:
    importance = torch.rand(3, 4)
    a = importance / importance.max()
    with open_log(tmp_path, 0, 2) as log:
        log.importance({"heads": importance}, {"heads": a})
        log.protection("heads", step=2, one_minus_a=1 - a, movement=a, applied_over_proposed=0.4)
    assert (tmp_path / "importance-heads.png").read_bytes().startswith(b"\x89PNG")
    board = scalars(tmp_path)
    assert {"importance/heads", "protection/heads"} <= set(board.Tags()["images"])
    assert board.Tags()["histograms"] == ["soft_mask/heads"]
    (record,) = read_log(tmp_path / "log.jsonl")
    torch.testing.assert_close(torch.tensor(record["one_minus_a"]), 1 - a, atol=1e-5, rtol=0)
    assert record["applied_over_proposed"] == 0.4


def test_a_kind_with_thousands_of_units_a_layer_is_logged_by_figures(tmp_path: Path) -> None:
    importance = torch.rand(2, 3072)
    with open_log(tmp_path, 0, 2) as log:
        log.importance({"ffn_intermediate": importance}, {"ffn_intermediate": importance})
        log.protection(
            "ffn_intermediate", step=2, one_minus_a=importance, movement=importance, target_protection=0.75
        )
    assert not list(tmp_path.glob("*.png"))
    board = scalars(tmp_path)
    assert board.Tags()["images"] == []
    assert set(board.Tags()["histograms"]) == {"importance/ffn_intermediate", "soft_mask/ffn_intermediate"}
    (figure,) = board.Scalars("protection/ffn_intermediate/target_protection")
    assert (figure.step, figure.value) == (2, 0.75)
    (record,) = read_log(tmp_path / "log.jsonl")
    assert record == {"event": "protection", "step": 2, "kind": "ffn_intermediate", "target_protection": 0.75}


def test_settings_are_text_in_tensorboard(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, 2) as log:
        log.settings({"learning_rate": 1e-4})
    assert scalars(tmp_path).Tags()["tensors"] == ["settings/text_summary"]


def on_screen(output: str) -> list[str]:
    """The lines that a terminal holds after it was sent ``output``."""
    lines, row, column = [""], 0, 0
    for escape, command, character in re.findall(r"(\x1b\[([0-9;?]*[A-Za-z]))|([^\x1b])", output):
        if escape:
            if command == "2K":
                lines[row] = ""
            elif command == "1A":
                row -= 1
            else:
                assert command[-1] in "mhl", f"unknown terminal command {command}"  # colour, cursor
        elif character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
    return lines


def test_progress_bar_and_lines_share_a_terminal(tmp_path: Path) -> None:
    """On a real (pseudo-)terminal every line comes whole, with a bar redrawn below it and gone at the end."""
    program = textwrap.dedent(
        f"""
        import sys, time
        from dga_scale.logging.run_log import open_log
        with open_log({str(tmp_path)!r}, 0, 5) as log:
            for step in range(1, 6):
                log.step({{"step": step, "loss/total": 1.0}})
                print("a library says", step)
                time.sleep(0.12)
        """
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "20"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    text = shown.decode()
    assert "━" in text
    assert "5/5" in text
    assert [line for line in on_screen(text) if line.strip()] == [
        line for i in range(1, 6) for line in (f"step {i}/5  loss 1.0000", f"a library says {i}")
    ]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is back
