"""Write end tasks that the ``datasets`` library reads as a task folder of this package."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dga_scale.errors import UserError
from dga_scale.run_folder import write_text

SPLITS = {"train": ("train",), "dev": ("validation", "dev", "valid", "validation_matched"), "test": ("test",)}
"""The splits of a task folder, with their names in published datasets."""

TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
"""The columns of the first and second text; the first pair that a dataset has is used."""

LABELS = ("label", "labels", "coarse_label")
"""The columns of the label; the first one that a dataset has is used."""


def exported(task: str, root: Path) -> str:
    """Return ``task`` where it is a task folder already; otherwise export it into a new one in ``root``.

    A task folder holds train.jsonl, dev.jsonl and test.jsonl. A test split whose labels are hidden (-1, as
    GLUE's) is left out.

    Args:
        task: A task folder; a folder that ``datasets`` saved or reads; or a name on the hub, NAME or
            NAME:CONFIG.
        root: The folder in which the task folder is made. An existing task folder there is used again.

    Raises:
        UserError: ``datasets`` can't read the task, or it has no train split or no column of texts or labels.
    """
    path = Path(task)
    ours = any((path / f"{name}.jsonl").is_file() for name in SPLITS)
    looks_like_path = path.is_absolute() or task.startswith(".") or task.count("/") > 1
    looks_like_path |= path.parent != Path() and path.parent.is_dir()  # endtasks/typo
    if ours or (looks_like_path and not path.is_dir()):
        return task  # a path that does not exist is refused by ``load_task``
    name, _, config = (task, "", "") if path.is_dir() else task.partition(":")
    folder = root / (config or Path(name).resolve().name)
    if (folder / "train.jsonl").is_file():
        return str(folder)
    if not path.is_dir():
        print(f"--task {task} is not a folder: reading the dataset of that name from the hub", flush=True)
    found = _load(task, name, config)
    splits = {ours: next((found[n] for n in theirs if n in found), None) for ours, theirs in SPLITS.items()}
    if splits["train"] is None:
        raise UserError(f"no train split: it has {', '.join(found)}. Give another dataset.", task)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("dev", "test", "train"):  # train is last: a folder that has it counts as complete
        if splits[split] is not None and (lines := list(_lines(task, splits[split]))):
            write_text(folder / f"{split}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def _load(task: str, name: str, config: str) -> Any:
    import datasets  # costs half a second

    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever a broken folder or an unknown name raises inside datasets
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no folder with train.jsonl, and `datasets` can't read it: {reason} Give a folder of "
            "train.jsonl and test.jsonl, or NAME:CONFIG of a dataset on the hub.",
            task,
        ) from None
    finally:
        if progress:
            datasets.enable_progress_bars()


def _lines(task: str, split: Any) -> Iterator[dict[str, Any]]:
    """Yield the lines of a split of a task folder; none where all labels are hidden."""
    columns = split.column_names
    texts = next((pair for pair in TEXTS if all(c is None or c in columns for c in pair)), None)
    label = next((name for name in LABELS if name in columns), None)
    if texts is None or label is None:
        missing = "label" if texts else "text"
        raise UserError(
            f"no column of the {missing} among {', '.join(columns)}. Write a folder of train.jsonl and "
            'test.jsonl: {"text": ..., "text_pair": ..., "label": ...} a line.',
            task,
        )
    if set(split[label]) <= {-1, None}:
        return
    names = getattr(split.features[label], "names", None)
    for row in split:
        value = row[label]
        line = {"text": row[texts[0]], "label": value if names is None else names[value]}
        if texts[1] is not None:
            line["text_pair"] = row[texts[1]]
        yield line
