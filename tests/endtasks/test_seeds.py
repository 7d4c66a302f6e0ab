"""Several seeds: what is written, what is skipped, what is refused; and forgetting over stages."""

import json
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest

from dga_scale.endtasks import seeds as module
from dga_scale.endtasks.cli import finetune, forgetting
from dga_scale.endtasks.forgetting import find_stages, forgetting_rate
from dga_scale.errors import UserError
from tests.helpers.forks import launch
from tests.helpers.tiny_tasks import tiny_model, write_task

FLAGS = ["--epochs", "2", "--learning_rate", "3e-3", "--metric", "accuracy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks") / "words")


def run(model: Path, task: Path, output: Path, *more: str) -> None:
    finetune(["--model", str(model), "--task", str(task), "--output_dir", str(output), *FLAGS, *more])


def test_seeds_in_processes_score_as_one_after_another(
    model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(model, task, tmp_path / "one", "--seeds", "2")
    printed = capsys.readouterr().out
    run(model, task, tmp_path / "two", "--seeds", "2", "--jobs", "2")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one == two
    values = one["scores"]["accuracy"]["by_seed"]
    assert list(values) == ["1", "2"]
    assert one["scores"]["accuracy"]["mean"] == pytest.approx(statistics.mean(values.values()))
    assert one["scores"]["accuracy"]["std"] == pytest.approx(statistics.stdev(values.values()))
    assert (
        "2 classes, 48 train, 0 dev, 24 scored (test.jsonl); always the largest class: 0.5"
        in printed.replace("accuracy 0.5", "0.5")
    )
    assert f"accuracy: {one['scores']['accuracy']['mean']:.4f} ± " in printed


def test_finished_seeds_are_not_run_again(
    model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(model, task, tmp_path / "out", "--seeds", "1")
    before = (tmp_path / "out" / "seed-1.json").read_text()
    lines = (tmp_path / "out" / "seed-1.predictions.jsonl").read_text().splitlines()
    predicted = [json.loads(line) for line in lines]
    right = sum(record["prediction"] == record["label"] for record in predicted)
    assert right / len(predicted) == json.loads(before)["scores"]["accuracy"]
    examples = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    assert [record["text"] for record in predicted] == [example["text"] for example in examples]
    ran = []
    one = module._run
    monkeypatch.setattr(module, "_run", lambda *args: (ran.append(args[1]), one(*args)))
    run(model, task, tmp_path / "out", "--seeds", "2")
    assert ran == [2]
    assert (tmp_path / "out" / "seed-1.json").read_text() == before


def test_results_of_other_settings_are_refused(model: Path, task: Path, tmp_path: Path):
    run(model, task, tmp_path / "out", "--seeds", "1", "--max_train_examples", "10")
    with pytest.raises(UserError, match=r"seed-1.json: made with another task\. Give another folder"):
        run(model, task, tmp_path / "out", "--seeds", "1")
    with pytest.raises(UserError, match=r"another recipe\. Give"):
        run(model, task, tmp_path / "out", "--seeds", "1", "--max_train_examples", "10", "--batch_size", "4")
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"another model\. Give"):
        run(other, task, tmp_path / "out", "--seeds", "1", "--max_train_examples", "10")
    (tmp_path / "out" / "seed-1.json").write_text("{")
    with pytest.raises(UserError, match=r"seed-1.json: damaged"):
        run(model, task, tmp_path / "out", "--seeds", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--learning_rate", "0"], "--learning_rate 0: must be above 0"),
        (["--metric", "pearson"], "--metric pearson: the task is a classification"),
        (["--max_length", "2"], "--max_length 2: must be at least 8"),
        (["--epoch", "3"], "unknown option --epoch. Did you mean --epochs"),
    ],
)
def test_mistakes_on_the_command_line(task: Path, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        finetune(["--model", "m", "--task", str(task), "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_refused_is_the_first_thing_said(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError, match=r"--model .*nowhere: no such folder"):
        run(tmp_path / "nowhere", task, tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_forgetting_rate_of_a_hand_made_table():
    """DAS: ((0.8 - 0.7) + (0.6 - 0.65)) / 2."""
    scores = [[0.8], [0.75, 0.6], [0.7, 0.65, 0.9]]
    assert forgetting_rate(scores) == pytest.approx((0.1 - 0.05) / 2)
    assert forgetting_rate([[0.5], [0.6, 0.1]]) == pytest.approx(-0.1)


@pytest.fixture
def sequence(model: Path, tmp_path: Path) -> Path:
    for stage in ("1-restaurant", "2-acl"):
        shutil.copytree(model, tmp_path / "run" / stage / "model")
    (tmp_path / "run" / "3-ai").mkdir()
    (tmp_path / "run" / "tensorboard").mkdir()
    return tmp_path / "run"


def test_forgetting_over_the_stages_of_a_run(sequence: Path, task: Path, capsys: pytest.CaptureFixture[str]):
    """Both stages hold one model, so nothing is forgotten: A[0][0] = A[1][0], seed by seed."""
    assert [stage.domain for stage in find_stages(sequence)] == ["restaurant", "acl"]
    other = write_task(sequence.parent / "other", train=24)
    arguments = [str(sequence), "--task", f"restaurant={task}", f"acl={other}", "--seeds", "2", *FLAGS]
    forgetting(arguments)
    result = json.loads((sequence / "forgetting.json").read_text())
    assert (result["domains"], result["tasks"]) == (["restaurant", "acl"], ["words", "other"])
    assert [len(row) for row in result["scores"]] == [1, 2]
    assert result["scores"][0][0] == result["scores"][1][0]
    assert result["forgetting_rate"] == {"mean": 0.0, "std": 0.0, "by_seed": {"1": 0.0, "2": 0.0}}
    assert (sequence / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert "forgetting rate: 0.0000" in capsys.readouterr().out
    files = {file: file.stat().st_mtime_ns for file in sequence.rglob("seed-*.json")}
    assert len(files) == 6
    forgetting(arguments)
    assert {file: file.stat().st_mtime_ns for file in sequence.rglob("seed-*.json")} == files


def test_sequences_and_tasks_that_do_not_go_together(sequence: Path, task: Path):
    with pytest.raises(UserError, match=r"stage acl of .* has no task\. Add --task acl=DIR"):
        forgetting([str(sequence), "--task", f"restaurant={task}"])
    with pytest.raises(UserError, match=r"--task ai=\.\.\.: .* has no finished stage of that name"):
        forgetting([str(sequence), "--task", f"restaurant={task}", f"acl={task}", f"ai={task}"])
    with pytest.raises(UserError, match=r"--task restaurant: write DOMAIN=DIR"):
        forgetting([str(sequence), "--task", "restaurant"])
    shutil.rmtree(sequence / "2-acl" / "model")
    with pytest.raises(UserError, match="run: 1 finished stages"):
        find_stages(sequence)
    shutil.rmtree(sequence / "2-acl")
    with pytest.raises(
        UserError, match="stage 2 of its sequence of domains is missing: it holds 1-restaurant, 3-ai"
    ):
        find_stages(sequence)
    with pytest.raises(UserError, match="no such folder"):
        find_stages(sequence / "nowhere")


def work_for_ever(folder: Path) -> None:
    module._start_worker(1, [])
    (folder / "tmp").write_text(str(os.getpid()))
    (folder / "tmp").rename(folder / "pid")
    time.sleep(600)


def be_killed_beside_a_worker(folder: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=work_for_ever, args=(folder,))
    worker.start()
    while worker.is_alive() and not (folder / "pid").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    assert launch(1, be_killed_beside_a_worker, tmp_path).wait() == [-signal.SIGKILL]
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 120
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)
