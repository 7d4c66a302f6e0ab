"""Evaluations in a run's log: the text that was scored, and the change since the base model.

An evaluation says of every held-out text what it is: the content hash of its corpus, and how many of its
rows were scored (a fixed sample)::

    {"event": "evaluation", "step": 0, "domain_loss": 3.1, "domain_accuracy": 0.4, ...,
     "texts": {"domain": {"content_hash": "9f2c...", "rows": 2000}, ...}}

The evaluation at step 0 is the base model's. Figures are compared only where they are of the same text: a run
may be resumed with another, or with more rows of it.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dga_scale.logging.json_lines import read_log
from dga_scale.logging.records import EVALUATION, FIGURES, TEXTS
from dga_scale.logging.run_log import RunLog
from dga_scale.run_folder import LOG_FILE

NOT_MEASURED = "not measured"
"""The words that tables show for a figure that is None."""

Texts = dict[str, dict[str, Any]]
"""The ``content_hash`` and ``rows`` of each held-out text, by its name. Plain JSON."""


class BeforeAfter(NamedTuple):
    """A figure of the base model and of the trained one, on the same text."""

    before: float | None
    """The base model's figure; None: it was not measured on this text."""
    after: float

    def cells(self, form: str) -> tuple[str, str, str]:
        """Format the figure for a table: before, after and change, each number in the format ``form``."""
        if self.before is None:
            return NOT_MEASURED, format(self.after, form), ""
        return (
            format(self.before, form),
            format(self.after, form),
            format(self.after - self.before, f"+{form}"),
        )


def perplexity(loss: float) -> float | None:
    """Return the exponential of a loss in nats; None where it is larger than a number can be."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def evaluations(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Pick the evaluations out of a log's records, in the order of their steps."""
    return sorted((r for r in records if r.get("event") == EVALUATION), key=lambda r: r["step"])


def last_texts(records: Sequence[Mapping[str, Any]]) -> Texts:
    """Return the texts that the last evaluation scored; empty where there was none."""
    found = evaluations(records)
    return found[-1].get(TEXTS, {}) if found else {}


def history(records: Sequence[Mapping[str, Any]], name: str, figure: str = "loss") -> list[tuple[int, float]]:
    """Return steps and values of a figure on the text that was last evaluated under a name.

    Evaluations of another text are left out, whatever it was called; one that scored the same text under
    another name is not.
    """
    text = last_texts(records).get(name)
    if text is None:
        return []
    return [
        (record["step"], value)
        for record in evaluations(records)
        if (value := _on_text(record, text, figure)) is not None
    ]


def before_and_after(
    records: Sequence[Mapping[str, Any]], until: int | None = None
) -> dict[str, BeforeAfter]:
    """Compare the last evaluation with the base model's, by figure: ``domain_loss``, ``domain_accuracy``, ...

    Args:
        records: A run's log.
        until: The step whose model is compared; None: the last one's.

    Returns:
        Nothing where only the base was evaluated.

    """
    known = [r for r in evaluations(records) if until is None or r["step"] <= until]
    return dict(_compared(known))


def _compared(known: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, BeforeAfter]]:
    for name in last_texts(known):
        for figure in FIGURES:
            values = history(known, name, figure)
            if values and values[-1][0] > 0:
                first, before = values[0]
                yield f"{name}_{figure}", BeforeAfter(before if first == 0 else None, values[-1][1])


def _on_text(record: Mapping[str, Any], text: Mapping[str, Any], figure: str) -> float | None:
    """Return an evaluation's figure on a text, under whatever name; None where it has none."""
    names = [name for name, scored in record.get(TEXTS, {}).items() if scored == text]
    return next((record[f"{name}_{figure}"] for name in names if f"{name}_{figure}" in record), None)


def log_before(log: RunLog, before: Mapping[str, Any]) -> None:
    """Log the base model's evaluation that a checkpoint brought, where the log has none.

    The log of a run that resumes in a new folder has none, nor has one that was lost.
    """
    if log.active and before:
        known = evaluations(read_log(log.folder / LOG_FILE))
        if not any(record["step"] == 0 for record in known):
            log.event(EVALUATION, step=0, **before)
