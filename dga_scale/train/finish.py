"""The end of a run: the exported model, a summary, the report."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dga_scale.checkpoint.export import consolidate
from dga_scale.config.methods.shared import soft_mask_of
from dga_scale.errors import UserError
from dga_scale.launch.world import Cluster
from dga_scale.logging.evaluations import BeforeAfter, before_and_after, last_texts
from dga_scale.logging.json_lines import LOG_FILE, read_log
from dga_scale.logging.records import ScoredText
from dga_scale.report.report import write_report
from dga_scale.run_folder import RunFolder, write_text
from dga_scale.storage.checked_json import load_object
from dga_scale.storage.safetensors_stream import FileRecord, record_of
from dga_scale.storage.typed_json import FileName, check_fields
from dga_scale.train.inputs import Inputs

_ROWS = 1 << 20
"""The rows whose tokens are counted at a time."""


_SUMMARY = {
    "method": str,
    "corpus": str,
    "steps": int,
    "texts": dict[str, ScoredText],
    "model_files": dict[FileName, FileRecord],
}
"""The fields of a summary that are read again, besides the losses."""


def finish(inputs: Inputs, cluster: Cluster) -> None:
    """Write ``model/``, ``summary.json`` and ``report.html``, and print the change of the losses."""
    cluster.run_on_first(lambda: _write(inputs, cluster))


def _write(inputs: Inputs, cluster: Cluster) -> None:
    folder = inputs.folder
    finished = _finished(folder)
    if finished.get("steps") != inputs.config.optimization.max_steps:
        _export(folder)  # where the run was extended, in place of the model of fewer steps
    elif changed := _changed(folder.model, finished):
        print(f"{changed} is not what was exported: the model is exported again from its checkpoint")
        _export(folder)
    elif not any("event" not in record for record in read_log(folder.log)):
        print(f"{folder.log} has no steps any more: summary and report stay as they were")
        print_summary(finished, folder)
        return
    summary = summarize(inputs, cluster)
    folder.report.unlink(missing_ok=True)  # of fewer steps: by a report a sequence knows a finished run
    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")  # after the model that it describes
    write_report([folder.path], folder.report)
    print_summary(summary, folder)


def has_ended(inputs: Inputs) -> bool:
    """Return whether nothing is left to do in a folder of a finished run that has no checkpoints any more.

    Raises:
        UserError: More steps are asked for, or the model was changed: without checkpoints no step can follow,
            and what there is would be overwritten.
    """
    folder, finished = inputs.folder, _finished(inputs.folder)
    if not finished or inputs.config.run.resume != "auto" or any(folder.checkpoints.glob("step-*")):
        return False
    if finished.get("steps") == inputs.config.optimization.max_steps and not _changed(folder.model, finished):
        print(f"the run in {folder.path} is finished; its checkpoints were removed")
        print_summary(finished, folder)
        return True
    raise UserError(
        f"--output_dir {folder.path} holds a finished run of {finished.get('steps')} steps whose "
        "checkpoints, from which it would go on, were removed. Give another --output_dir, and perhaps "
        f"--model {folder.model}"
    )


def _export(folder: RunFolder) -> None:
    new = folder.model.with_name(folder.model.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    consolidate(folder.path, None, new)
    shutil.rmtree(folder.model, ignore_errors=True)
    new.rename(folder.model)


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """Read the summary of a finished run.

    Raises:
        UserError: It can't be read, or a field is missing or wrong.
    """
    try:
        summary = load_object(folder.summary)
        check_fields(summary, _SUMMARY, needed=True)
        check_fields(
            summary, {name: BeforeAfter for name in summary if name.endswith(("_loss", "_accuracy"))}
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"damaged ({error}). Remove it, and run the same command again", folder.summary
        ) from error
    return summary


def _finished(folder: RunFolder) -> dict[str, Any]:
    """Return the summary of a finished run; empty where there is none that can be read."""
    try:
        return read_summary(folder)
    except UserError:
        return {}


def finished_steps(folder: RunFolder) -> int | None:
    """Return how many steps a finished run has made; None if it is not finished."""
    return _finished(folder).get("steps")


def _changed(model: Path, finished: dict[str, Any]) -> Path | None:
    """Return the first file of the exported weights that is gone or not what it was, if there is one."""
    for name, record in finished["model_files"].items():
        path = model / name
        if not path.is_file() or asdict(record_of(path)) != record:
            return path
    return None if finished["model_files"] else model


def summarize(inputs: Inputs, cluster: Cluster) -> dict[str, Any]:
    """Return the run's figures: settings that matter, held-out losses before and after, time.

    "before" is null where the base model was not measured on the text that the trained one was.
    """
    records = read_log(inputs.folder.path / LOG_FILE)
    steps = [r for r in records if "event" not in r]
    figures = {name: found._asdict() for name, found in before_and_after(records).items()}
    config = inputs.config
    return {
        "model": config.model.model,
        "corpus": str(inputs.corpus.path),
        "mix": config.data.mix or [],
        "method": config.method_name,
        "soft_mask": soft_mask_of(config.method),
        "steps": config.optimization.max_steps,
        "tokens": _tokens(inputs),
        "world_size": cluster.world_size,
        "zero_stage": inputs.resolved.zero_stage,
        "precision": inputs.resolved.precision,
        "seconds_per_step": _median([r["step_seconds"] for r in steps if r.get("step_seconds")]),
        "refused_steps": sum(r.get("event") == "refused" for r in records),
        "texts": last_texts(records),
        "model_files": {
            path.name: asdict(record_of(path)) for path in sorted(inputs.folder.model.glob("*.safetensors"))
        },
        **figures,
    }


def print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print the table that a run ends with, and where everything lies."""
    console = Console(highlight=False)
    table = Table(title=f"{summary['method']} on {summary['corpus']}, {summary['steps']} steps")
    for column in ("held-out text", "loss before", "loss after", "change"):
        table.add_column(column, justify="left" if column == "held-out text" else "right")
    for name in [key.removesuffix("_loss") for key in summary if key.endswith("_loss")]:
        found = BeforeAfter(**summary[f"{name}_loss"])
        table.add_row(name, *found.cells(".4f"))
    if table.row_count:
        console.print(table)
    board = folder.tensorboard
    for what, where in (
        ("model", folder.model),
        ("report", folder.report),
        *([("TensorBoard", f"tensorboard --logdir {board}")] if board.exists() else []),
        ("log", folder.path / LOG_FILE),
    ):
        console.print(f"{what:>12}: {where}", soft_wrap=True)


def _tokens(inputs: Inputs) -> int:
    """Count the tokens of all rows that the run has read, again where it has read them again."""
    rows = inputs.config.optimization.max_steps * inputs.resolved.global_batch_size
    mixture = inputs.mixture
    parts = (mixture.picks(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    return sum(int(mixture.lengths(part).sum()) for part in parts)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
