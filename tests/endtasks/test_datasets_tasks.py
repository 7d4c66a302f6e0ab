"""Tasks that `datasets` reads, the choice of a split, and a command that prints nothing but its own lines."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dga_scale.endtasks.cli import finetune
from dga_scale.endtasks.datasets_tasks import exported
from dga_scale.endtasks.tasks import class_shares, load_task, split_folder
from dga_scale.errors import UserError
from tests.helpers.ranks import REPOSITORY
from tests.helpers.tiny_tasks import examples, tiny_model, write_task


def save_glue(folder: Path, hidden: int = -1) -> Path:
    """A saved DatasetDict as GLUE's: numbered classes with names, labels of the test split hidden."""
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
            "idx": datasets.Value("int32"),
        }
    )

    def rows(count: int, label: int | None = None) -> datasets.Dataset:
        lines = [
            {"sentence1": f"a{n}", "sentence2": f"b{n}", "label": n % 2 if label is None else label, "idx": n}
            for n in range(count)
        ]
        return datasets.Dataset.from_list(lines, features=features)

    splits = {"train": rows(6), "validation": rows(4), "test": rows(3, hidden)}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_becomes_a_folder_of_ours(tmp_path: Path):
    folder = exported(str(save_glue(tmp_path / "rte")), tmp_path / "out")
    task = load_task(folder)
    assert (task.name, task.labels) == ("rte", ("entailment", "not_entailment"))
    assert (len(task.train), len(task.dev), len(task.test), task.scored_on) == (6, 0, 4, "dev")
    assert (task.train[1].text, task.train[1].text_pair, task.train[1].label) == (
        "a1",
        "b1",
        "not_entailment",
    )
    written = (Path(folder) / "train.jsonl").stat().st_mtime_ns
    assert exported(str(tmp_path / "rte"), tmp_path / "out") == folder
    assert (Path(folder) / "train.jsonl").stat().st_mtime_ns == written


def test_a_folder_of_ours_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = str(write_task(tmp_path / "task"))
    assert exported(task, tmp_path / "out") == task
    assert exported(str(tmp_path / "nowhere"), tmp_path / "out") == str(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "endtasks").mkdir()
    assert exported("endtasks/typo", tmp_path / "out") == "endtasks/typo"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("body,label", r"no column of the text among body, label"),
        ("text,kind", r"no column of the label among text, kind"),
    ],
)
def test_columns_that_are_not_there(header: str, message: str, tmp_path: Path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.csv").write_text(f"{header}\na,x\nb,y\n")
    with pytest.raises(UserError, match=message):
        exported(str(tmp_path / "task"), tmp_path / "out")


def test_what_datasets_can_not_read(tmp_path: Path):
    (tmp_path / "task").mkdir()
    with pytest.raises(UserError, match=r"no folder with train\.jsonl, and `datasets` can't read it"):
        exported(str(tmp_path / "task"), tmp_path / "out")
    (tmp_path / "task" / "test.csv").write_text("text,label\na,x\n")
    with pytest.raises(UserError, match=r"no train split: it has test"):
        exported(str(tmp_path / "task"), tmp_path / "out")


def test_the_split_is_the_folder_beside(tmp_path: Path):
    official, dga = write_task(tmp_path / "asc_phone"), write_task(tmp_path / "asc_phone_dga_split", train=20)
    for folder in (official, dga):
        assert split_folder(str(folder), "official") == str(official)
        assert split_folder(str(folder), "dga") == str(dga)
    lonely = write_task(tmp_path / "chemprot")
    with pytest.raises(UserError, match=r"--split dga: there is no folder .*chemprot_dga_split\. Leave"):
        finetune(["--model", "m", "--task", str(lonely), "--output_dir", str(tmp_path), "--split", "dga"])


def test_classes_by_how_frequent_they_are(tmp_path: Path):
    task = load_task(write_task(tmp_path / "task", train=5))
    assert class_shares(task.train) == [("science", 0.6), ("town", 0.4)]


def test_a_csv_task_is_learnt_and_nothing_else_is_printed(tmp_path: Path):
    """A language model has no weights for the new head: of course, so there is no warning."""
    model = tiny_model(tmp_path)
    (tmp_path / "words").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        with open(tmp_path / "words" / f"{split}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(examples(16, seed))
    command = [
        sys.executable,
        "launchers/finetune.py",
        "--model",
        str(model),
        "--task",
        str(tmp_path / "words"),
    ]
    command += ["--output_dir", str(tmp_path / "out"), "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "words: 2 classes, 16 train, 16 dev, 16 scored (test.jsonl)" in done.stdout
    assert "classes of train: science 50.0% the largest, town 50.0% the smallest" in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 4 + 4 + 1, done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["majority_share"] == 0.5
