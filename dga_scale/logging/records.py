"""The check of a log's records, as a report or a resumed run reads them.

A step's record holds numbers, null where one was NaN or infinite, and lists of them (one a rank). Of an event
those fields are checked that something reads.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dga_scale.storage.typed_json import build, check_fields

EVALUATION, TEXTS, PROTECTION = "evaluation", "texts", "protection"
FIGURES = ("loss", "accuracy")


class ScoredText(NamedTuple):
    """A held-out text that was scored: the content hash of its corpus, and how many of its rows."""

    content_hash: str
    rows: int


_SINGLE = ("learning_rate", "step_seconds", "data_wait_seconds", "tokens_per_second", "mfu")
"""The values of a step that are one number; others may be a list, such as memory_gib."""


class _Means(NamedTuple):
    protected_units: int
    target_protection: float
    measured_protection: float


class _Units(NamedTuple):
    one_minus_a: list[list[float | None]]
    movement: list[list[float | None]]


def check_record(record: Mapping[str, Any]) -> None:
    """Check a record of a log.

    Raises:
        ValueError: A field is missing or wrong; it is named.
    """
    build(int, record.get("step"), "step")
    if "event" not in record:
        check_fields(record, {"memory_gib": list[float] | None})
        for name, value in record.items():
            single = name in _SINGLE or name.startswith("loss/") or not isinstance(value, list)
            build(float | None if single else list[float | None], value, name)
        return
    build(str, record["event"], "event")
    if record["event"] == EVALUATION:
        check_evaluation(record)
    elif record["event"] == PROTECTION:
        build(str, record.get("kind"), "kind")
        for name, group in (("protected_units", _Means), ("movement", _Units)):  # what is read with it
            if name in record:
                build(group, {field: record.get(field) for field in group._fields})
        if "movement" not in record:
            return
        widths = [[len(row) for row in record[name]] for name in _Units._fields]
        if widths[0] != widths[1] or len({*widths[0]}) > 1:
            raise ValueError("one_minus_a and movement are no matrices of one shape")


def check_evaluation(values: Mapping[str, Any]) -> None:
    """Check what an evaluation says besides its step, in a log or a checkpoint.

    Raises:
        ValueError: A figure is no number, or a text is not described; the field is named.
    """
    check_fields(values, {TEXTS: dict[str, ScoredText]})
    for name in values:
        if name.endswith(tuple(f"_{figure}" for figure in FIGURES)):
            build(float | None, values[name], name)
