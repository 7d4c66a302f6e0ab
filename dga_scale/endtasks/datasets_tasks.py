"""End tasks that the ``datasets`` library reads, written out as a folder of ours."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dga_scale.errors import UserError
from dga_scale.run_folder import write_text

SPLITS = {"train": ("train",), "dev": ("validation", "dev", "valid", "validation_matched"), "test": ("test",)}
"""Our splits, and what they are called elsewhere."""

TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
"""Columns of the first and second text: the first line that is there."""

LABELS = ("label", "labels", "coarse_label")


def exported(task: str, root: Path) -> str:
    """A folder of train.jsonl, dev.jsonl, test.jsonl: ``task`` itself where it is one, else made in ``root``.

    A test split whose labels are hidden (-1, as GLUE's) is left out.

    Args:
        task: Such a folder; one that ``datasets`` saved or reads; or a name on the hub, NAME or NAME:CONFIG.
        root: Where the task's folder is made. One that is there already is taken.

    Raises:
        UserError: nothing that ``datasets`` reads, no train split, or no column of texts or labels.

    """
    path = Path(task)
    ours = any((path / f"{name}.jsonl").is_file() for name in SPLITS)
    looks_like_path = path.is_absolute() or task.startswith(".") or task.count("/") > 1
    looks_like_path |= path.parent != Path() and path.parent.is_dir()  # endtasks/typo
    if ours or (looks_like_path and not path.is_dir()):
        return task  # in the second case to be refused as a folder that does not exist
    name, _, config = (task, "", "") if path.is_dir() else task.partition(":")
    folder = root / (config or Path(name).resolve().name)
    if (folder / "train.jsonl").is_file():
        return str(folder)
    if not path.is_dir():
        print(f"--task {task} is no folder here: looking for a dataset of that name on the hub", flush=True)
    found = _load(name, config)
    splits = {ours: next((found[n] for n in theirs if n in found), None) for ours, theirs in SPLITS.items()}
    if splits["train"] is None:
        raise UserError(f"--task {task} has no train split: it has {', '.join(found)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("dev", "test", "train"):  # train last: with it the folder is taken for complete
        if splits[split] is not None and (lines := list(_lines(task, splits[split]))):
            write_text(folder / f"{split}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def _load(name: str, config: str) -> Any:
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
            f"--task {name}: no folder with train.jsonl, and `datasets` can't read it: {reason} Give a "
            "folder of train.jsonl and test.jsonl, or NAME:CONFIG of a dataset on the hub."
        ) from None
    finally:
        if progress:
            datasets.enable_progress_bars()


def _lines(task: str, split: Any) -> Iterator[dict[str, Any]]:
    """Lines of our files; none where all labels are hidden."""
    columns = split.column_names
    texts = next((pair for pair in TEXTS if all(c is None or c in columns for c in pair)), None)
    label = next((name for name in LABELS if name in columns), None)
    if texts is None or label is None:
        missing = "label" if texts else "text"
        raise UserError(
            f"--task {task}: no column of the {missing} among {', '.join(columns)}. Write a folder of "
            'train.jsonl and test.jsonl: {"text": ..., "text_pair": ..., "label": ...} a line.'
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
