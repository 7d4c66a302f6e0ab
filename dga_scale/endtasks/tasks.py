"""Read and check end tasks: folders of train.jsonl, dev.jsonl and test.jsonl.

A line is ``{"text": ..., "text_pair": ..., "label": ...}``; all lines have ``text_pair``, or none has. Labels
are names of classes (strings or whole numbers), or numbers with a decimal point for a regression.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dga_scale.config.declaration import shown
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import json_problem

_HALF = re.compile("[\ud800-\udfff]")
"""A lone surrogate: JSON can escape it, UTF-8 can't hold it."""

SUBSET_SEED = 20_230_118
"""The seed that draws the examples of a smaller split: the same for every model and fine-tuning seed."""


@dataclass(frozen=True)
class Example:
    """One labelled text or pair of texts."""

    text: str
    text_pair: str | None
    label: str | float


@dataclass(frozen=True)
class Task:
    """The examples of an end task."""

    name: str
    path: Path
    labels: tuple[str, ...]
    """The classes in sorted order; empty for a regression."""
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    """The examples by which the epoch is chosen; without any, the last epoch is."""
    test: tuple[Example, ...]
    scored_on: str
    """The file that ``test`` was read from: "dev" where a task has no test.jsonl (GLUE's are not public)."""
    fingerprint: str
    """The sha256 over the files and the limits on the examples."""
    left_out: int = 0
    """The number of examples in the scored file that are not scored."""

    @property
    def regression(self) -> bool:
        """Whether the labels are numbers."""
        return not self.labels

    def with_at_most(
        self, train: int | None = None, dev: int | None = None, test: int | None = None
    ) -> "Task":
        """Limit each split to that many random examples (None: all), the same for every model and seed.

        At least one training example of every class is kept.

        Raises:
            UserError: A limit is below the number of classes in train, or below 1.
        """
        task = self._with_train(train)
        for name, count in (("dev", dev), ("test", test)):
            examples: tuple[Example, ...] = getattr(task, name)
            if count is None or count >= len(examples):
                continue
            if count < 1:
                raise UserError(f"--max_{name}_examples {count}: must be at least 1.")
            kept = np.random.default_rng(SUBSET_SEED).permutation(len(examples))[:count]
            chosen = tuple(examples[index] for index in sorted(kept.tolist()))
            changes: dict[str, Any] = {name: chosen}
            if name == "test":
                changes["left_out"] = len(examples) - count
            text = f"{task.fingerprint} {name} {count}"
            task = replace(task, fingerprint=hashlib.sha256(text.encode()).hexdigest(), **changes)
        return task

    def _with_train(self, count: int | None) -> "Task":
        if count is None or count >= len(self.train):
            return self
        if count < max(1, len(self.labels)):
            raise UserError(
                f"--max_train_examples {count}: task {self.name} has {len(self.labels)} classes. Keep at "
                "least one example of each."
            )
        order = np.random.default_rng(SUBSET_SEED).permutation(len(self.train)).tolist()
        first_of_class: dict[str | float, int] = {}
        if not self.regression:
            for index in order:
                first_of_class.setdefault(self.train[index].label, index)
        kept = list(dict.fromkeys([*first_of_class.values(), *order]))[:count]
        chosen = tuple(self.train[index] for index in sorted(kept))
        fingerprint = hashlib.sha256(f"{self.fingerprint} {count}".encode()).hexdigest()
        return replace(self, train=chosen, fingerprint=fingerprint)


DGA_SPLIT = "_dga_split"
"""The suffix of the folder that holds the papers' partition of a task's examples."""


def split_folder(folder: str, split: str) -> str:
    """Return the neighbouring folder with the same task's "official" or "dga" split.

    Raises:
        UserError: There is no such folder.
    """
    path = Path(folder)
    stem = path.name.removesuffix(DGA_SPLIT)
    chosen = path.with_name(stem + (DGA_SPLIT if split == "dga" else ""))
    if not chosen.is_dir():
        raise UserError(
            f"--split {split}: there is no folder {chosen}. Leave --split out to take {folder} as it is."
        )
    return str(chosen)


def load_task(folder: str | Path) -> Task:
    """Read and check a task's folder; dev.jsonl or test.jsonl may be missing, but not both.

    Raises:
        UserError: The folder does not exist, a split is missing or empty, a line (named) is not an example,
            there is only one class, or dev or test has labels that train lacks.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError("no such folder. Give one with train.jsonl and test.jsonl.", path)
    present = [name for name in ("train", "dev", "test") if (path / f"{name}.jsonl").is_file()]
    if "train" not in present or len(present) == 1:
        missing = "train.jsonl" if "train" not in present else "test.jsonl and no dev.jsonl"
        raise UserError(f"no {missing} in it. Write one example a line, as JSON.", path)
    splits = {name: _read(path / f"{name}.jsonl") for name in present}
    _check_pairs(path, splits)
    labels = _labels(path, splits)
    digest = hashlib.sha256()
    for name in present:
        digest.update(name.encode() + (path / f"{name}.jsonl").read_bytes())
    scored_on = "test" if "test" in present else "dev"
    return Task(
        name=path.resolve().name,
        path=path,
        labels=labels,
        train=splits["train"],
        dev=splits["dev"] if scored_on == "test" and "dev" in present else (),
        test=splits[scored_on],
        scored_on=scored_on,
        fingerprint=digest.hexdigest(),
    )


def _read(file: Path) -> tuple[Example, ...]:
    examples = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    examples.append(_example(line, f"{file}:{number}"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason}). Convert it, or restore it.", file) from None
    if not examples:
        raise UserError("no examples in it. Fill it, or remove a dev.jsonl that is not used.", file)
    return tuple(examples)


def _example(line: str, where: str) -> Example:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {json_problem(error)}. Write one example a line.", where) from None
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise UserError('no "text" in it. Write {"text": "...", "label": "..."}.', where)
    pair = content.get("text_pair")
    if pair is not None and not isinstance(pair, str):
        raise UserError(f'"text_pair" is {shown(pair)}, not a text.', where)
    if half := _HALF.search(f"{content['text']} {pair}"):
        raise UserError(f"half of a character, {half[0]!a}, in the text. Remove it.", where)
    return Example(content["text"], pair, _label(content.get("label"), where))


def _label(label: Any, where: str) -> str | float:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise UserError(f'"label" is {shown(label)}, neither a class name nor a number.', where)
    if isinstance(label, float) and not math.isfinite(label):
        raise UserError(f'"label" is {shown(label)}. A regression needs finite numbers.', where)
    return label if isinstance(label, float) else str(label)


def _check_pairs(path: Path, splits: dict[str, tuple[Example, ...]]) -> None:
    examples = [example for split in splits.values() for example in split]
    with_pair = sum(example.text_pair is not None for example in examples)
    if with_pair not in (0, len(examples)):
        raise UserError(
            f'{with_pair} of {len(examples)} examples have a "text_pair". All need one, or none.', path
        )


def _labels(path: Path, splits: dict[str, tuple[Example, ...]]) -> tuple[str, ...]:
    """Return the classes of the training examples, sorted; none for a regression."""
    numbers = sum(isinstance(example.label, float) for split in splits.values() for example in split)
    if numbers:
        if numbers != (total := sum(map(len, splits.values()))):
            raise UserError(
                f"{numbers} of {total} labels are decimal numbers, the others class names. A regression "
                "needs a decimal number (3.0, not 3) in every line.",
                path,
            )
        if len({example.label for example in splits["train"]}) == 1:
            raise UserError("all training examples have one label. There is nothing to learn.", path)
        return ()
    classes = Counter(str(example.label) for example in splits["train"])
    if len(classes) == 1:
        raise UserError(
            f"all training examples are of the class {next(iter(classes))!r}. There is nothing to learn.",
            path,
        )
    for name, split in splits.items():
        unseen = Counter(str(example.label) for example in split if str(example.label) not in classes)
        if unseen:
            line = _line_of(path / f"{name}.jsonl", next(iter(unseen)))
            counts = ", ".join(f"{label!r} ({count})" for label, count in unseen.items())
            raise UserError(
                f"a label that train.jsonl lacks: {counts}. No model can predict it: split the data so that "
                "train has every class, or remove these lines.",
                path / f"{name}.jsonl:{line}",
            )
    return tuple(sorted(classes))


def _line_of(file: Path, label: str) -> int:
    with open(file, encoding="utf-8") as lines:
        return next(
            n for n, line in enumerate(lines, 1) if line.strip() and str(json.loads(line)["label"]) == label
        )


def class_shares(examples: Sequence[Example]) -> list[tuple[str | float, float]]:
    """Return the labels with their share of the examples, the most frequent first."""
    counts = Counter(example.label for example in examples).most_common()
    return [(label, count / len(examples)) for label, count in counts]


def majority_share(examples: Sequence[Example]) -> float:
    """Return the share of the most frequent label: the accuracy of always predicting it."""
    return class_shares(examples)[0][1]
