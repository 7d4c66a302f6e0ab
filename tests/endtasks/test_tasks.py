"""Tasks read from folders, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dga_scale.endtasks.recipes import recipe_for
from dga_scale.endtasks.tasks import load_task, majority_share
from dga_scale.errors import UserError
from tests.helpers.tiny_tasks import examples, write_split, write_task


def test_splits_labels_and_pairs(tmp_path: Path):
    folder = tmp_path / "stance"
    folder.mkdir()
    write_split(folder / "train.jsonl", [{"text": "a", "text_pair": "b", "label": 1, "id": "x"},
                                         {"text": "c", "text_pair": "d", "label": 0}])  # fmt: skip
    write_split(folder / "dev.jsonl", [{"text": "e", "text_pair": "f", "label": 1}])
    write_split(folder / "test.jsonl", [{"text": "g", "text_pair": "h", "label": 0}, "", "  "])
    task = load_task(folder)
    assert (task.name, task.labels, task.regression, task.scored_on) == ("stance", ("0", "1"), False, "test")
    assert [len(split) for split in (task.train, task.dev, task.test)] == [2, 1, 1]
    assert (task.train[0].text, task.train[0].text_pair, task.train[0].label) == ("a", "b", "1")
    assert majority_share(task.train) == 0.5


def test_without_test_the_dev_split_is_scored_and_chooses_nothing(tmp_path: Path):
    folder = write_task(tmp_path / "glue", dev=6, test=0)
    task = load_task(folder)
    assert (task.scored_on, len(task.dev), len(task.test)) == ("dev", 0, 6)


def test_decimal_labels_make_a_regression(tmp_path: Path):
    folder = tmp_path / "similarity"
    folder.mkdir()
    write_split(folder / "train.jsonl", [{"text": "a", "label": 0.0}, {"text": "b", "label": 2.5}])
    write_split(folder / "test.jsonl", [{"text": "a", "label": 4.0}])
    task = load_task(folder)
    assert task.regression
    assert recipe_for(task.name, regression=True).metric == "pearson"


def test_a_smaller_training_set_keeps_every_class(tmp_path: Path):
    folder = write_task(tmp_path / "task", train=40)
    rare = [{"text": "rare one", "label": "rare"}]
    write_split(folder / "train.jsonl", [*examples(40), *rare])
    task = load_task(folder)
    small = task.with_at_most(train=4)
    assert len(small.train) == 4
    assert Counter(e.label for e in small.train)["rare"] == 1
    assert small == task.with_at_most(train=4)
    assert small.fingerprint != task.fingerprint
    assert task.with_at_most() is task
    with pytest.raises(UserError, match="--max_train_examples 2: task task has 3 classes"):
        task.with_at_most(train=2)


def test_fewer_scored_examples_are_a_fixed_sample(tmp_path: Path):
    task = load_task(write_task(tmp_path / "task", dev=10, test=24))
    small = task.with_at_most(dev=4, test=6)
    assert (len(small.train), len(small.dev), len(small.test), small.left_out) == (48, 4, 6, 18)
    assert set(small.test) < set(task.test)
    assert small == task.with_at_most(dev=4, test=6)
    fingerprints = {task.fingerprint, small.fingerprint, task.with_at_most(dev=4).fingerprint}
    assert len(fingerprints | {task.with_at_most(test=4).fingerprint}) == 4
    assert task.with_at_most(dev=10, test=99) is task
    with pytest.raises(UserError, match="--max_test_examples 0: must be at least 1"):
        task.with_at_most(test=0)


GOOD = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": GOOD}, r": no train\.jsonl in it\. Write one example a line"),
        ({"train": GOOD}, r"no test.jsonl and no dev.jsonl in it"),
        ({"train": GOOD, "test": []}, r"test.jsonl: no examples"),
        ({"train": GOOD, "dev": [], "test": GOOD}, r"dev.jsonl: no examples"),
        ({"train": [*GOOD, "{"], "test": GOOD}, r"train.jsonl:3: not JSON"),
        ({"train": [*GOOD, "[1]"], "test": GOOD}, r'train.jsonl:3: no "text"'),
        ({"train": GOOD, "test": [GOOD[0], {"label": "x"}]}, r'test.jsonl:2: no "text"'),
        ({"train": GOOD, "test": [{"text": "a"}]}, r'test.jsonl:1: "label" is null'),
        ({"train": GOOD, "test": [{"text": "a", "label": True}]}, r'test.jsonl:1: "label" is true'),
        ({"train": GOOD, "test": [{**GOOD[0], "text_pair": 3}]}, r'test.jsonl:1: "text_pair" is 3'),
        ({"train": GOOD, "test": [{**GOOD[0], "text_pair": "p"}]}, r'1 of 3 examples have a "text_pair"'),
        ({"train": GOOD, "test": ['{"text": "", "label": NaN}']}, r'test.jsonl:1: "label" is NaN. .*finite'),
        ({"train": GOOD, "test": ['{"text": "a", "label": 1e999}']}, r'test.jsonl:1: "label" is Infinity'),
        ({"train": [{**GOOD[0], "text_pair": "\udc80"}], "test": GOOD}, r"train.jsonl:1: half of a .*udc80"),
        ({"train": ['{"n": ' + "9" * 5000 + "}"], "test": GOOD}, r"train.jsonl:1: not JSON: Exceeds"),
        ({"train": ["[" * 10**5], "test": GOOD}, r"train.jsonl:1: not JSON: it is nested too deeply"),
        ({"train": GOOD[:1], "test": GOOD[:1]}, r"all training examples are of the class 'x'"),
        (
            {"train": GOOD, "test": [GOOD[0], {"text": "c", "label": "z"}, {"text": "d", "label": "z"}]},
            r"test.jsonl:2: a label that train.jsonl lacks: 'z' \(2\)",
        ),
        ({"train": GOOD, "dev": [{"text": "c", "label": "w"}], "test": GOOD}, r"dev.jsonl:1: a label"),
        ({"train": GOOD, "test": [{"text": "a", "label": 0.5}]}, r"1 of 3 labels are decimal numbers"),
        ({"train": [{"text": "a", "label": 0.5}] * 2, "test": [{"text": "a", "label": 0.5}]}, r"one label"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_line(tmp_path: Path, splits: dict[str, list[Any]], message: str):
    for name, lines in splits.items():
        write_split(tmp_path / f"{name}.jsonl", lines)
    with pytest.raises(UserError, match=message):
        load_task(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_task(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "epochs", "metric", "pair_first"),
    [
        ("asc_restaurant", 5, "macro_f1", True),
        ("asc_phone_dga_split", 15, "macro_f1", True),
        ("chemprot", 10, "micro_f1", False),
        ("colander", 5, "macro_f1", False),
    ],
)
def test_recipes_go_by_the_name_of_the_task(name: str, epochs: int, metric: str, pair_first: bool):
    recipe = recipe_for(name, regression=False)
    assert (recipe.epochs, recipe.metric, recipe.pair_first) == (epochs, metric, pair_first)


def test_the_tasks_of_the_papers_are_read(shared_data: Path):
    classes = {
        "asc_restaurant": 3, "asc_phone": 2, "asc_camera_dga_split": 2, "aclarc_citation_intent": 6,
        "scierc_relation": 7, "chemprot": 13, "trec": 6,
    }  # fmt: skip
    for name, count in classes.items():
        task = load_task(shared_data / "endtasks" / name)
        assert (len(task.labels), task.scored_on) == (count, "test")
    assert load_task(shared_data / "endtasks" / "stsb").regression
