"""An evaluation (results.json of tools/evaluate.py) as rows and sentences, of the terminal and the page."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

from dga_scale.config.declaration import Rule, shown
from dga_scale.errors import UserError
from dga_scale.logging import plots
from dga_scale.report import html
from dga_scale.storage.checked_json import load_object
from dga_scale.storage.typed_json import check_fields

RESULTS, FORMAT = "results.json", 1
COLUMNS = ("model", "value", "95% interval", "n", "difference", "95% interval", "p (t)", "p (flips)")


@dataclass(frozen=True)
class Row:
    """The score of a model on a corpus or task.

    Attributes:
        cells: One text for each of ``COLUMNS``.
        better: Whether it beats the base for sure (True), is worse for sure (False), or neither (None): the
            interval of the difference leaves 0 out. A loss is better low, a score high.

    """

    cells: tuple[str, ...]
    better: bool | None = None


@dataclass(frozen=True)
class _Range:
    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class _Difference:
    mean: float
    low: float | None
    high: float | None
    p_t: float | None
    p_sign_flip: float | None
    count: int = 0


_OVERLAP: dict[str, Any] = {
    "examples": Annotated[int, Rule(lambda count: 1 <= count < 2**63, "at least 1")],
    "found": int | None,
    "excluded_from": list[str],
}
_RESULTS = {
    "format": int,
    "base": str,
    "models": dict[str, dict[str, Any]],
    "overlap": dict[str, dict[str, Any]],
    "notes": list[str],
}
_ENTRY: dict[str, Any] = {"kind": str, "over": str, "difference": _Difference | None}
_ENTRIES: dict[str, dict[str, Any]] = {
    "corpora": {**_ENTRY, "loss": _Range, "perplexity": float | None},
    "tasks": {**_ENTRY, "score": _Range, "metric": str},
}


def _check(content: dict[str, Any]) -> None:
    """Check what is read of results.json.

    Raises:
        ValueError: A field is missing or wrong; it is named.
    """
    check_fields(content, _RESULTS, needed=True)
    if not content["models"]:
        raise ValueError("models is empty")
    for name, overlap in content["overlap"].items():
        check_fields(overlap, _OVERLAP, f"overlap.{name}.", needed=True)
    for label, model in content["models"].items():
        at = f"models.{label}."
        check_fields(model, dict.fromkeys(_ENTRIES, dict[str, dict[str, Any]]), at, needed=True)
        for group, kinds in _ENTRIES.items():
            for name, entry in model[group].items():
                check_fields(entry, kinds, f"{at}{group}.{name}.", needed=True)
                for found in (entry.get("loss") or entry.get("score"), entry["difference"]):
                    if found and (found["low"] is None) != (found["high"] is None):
                        raise ValueError(f"{at}{group}.{name} has one end of an interval")
        for loss in (f"{kind}_loss" for kind in ("domain", "general")):
            if loss in model:
                check_fields(model[loss], {"values": list[float]}, f"{at}{loss}.", needed=True)


def load_scores(folder: Path) -> dict[str, Any]:
    """Read the results that tools/evaluate.py left in ``folder``.

    Raises:
        UserError: There are none, they are damaged, or another version wrote them.

    """
    file = folder / RESULTS
    try:
        content = load_object(file)
        if (version := content.get("format")) != FORMAT:
            raise UserError(f"format {shown(version)}, this version reads {FORMAT}.", file)
        _check(content)
    except OSError as error:
        raise UserError(
            f"{error.strerror}. Give a folder that tools/evaluate.py wrote (its --output_dir).", file
        ) from None
    except ValueError as error:
        raise UserError(f"damaged ({error}). Run tools/evaluate.py again.", file) from None
    return content


def score_sections(models: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Return each corpus and task with a row for each model, the base first."""
    base = next(iter(models.values()))
    for group, quantity in (("corpora", "loss"), ("tasks", "score")):
        for name, of_base in base[group].items():
            rows = [_row(label, model[group].get(name), quantity) for label, model in models.items()]
            yield f"{of_base['kind']}: {name}, {of_base.get('metric', 'loss')}", rows


def _row(label: str, entry: Mapping[str, Any] | None, quantity: str) -> Row:
    if entry is None:
        return Row((label, "can't be compared", *[""] * (len(COLUMNS) - 2)))
    found, compared = entry[quantity], entry["difference"]
    value = f"{found['mean']:.4f}"
    if quantity == "loss":
        value += "" if entry["perplexity"] is None else f" (perplexity {entry['perplexity']:.4g})"
    cells = (label, value, _range(found), f"{found['count']} {entry['over']}")
    if compared is None:
        return Row((*cells, "", "", "", ""))
    p_values = (_p(compared["p_t"]), _p(compared["p_sign_flip"]))
    better = None
    if compared["low"] is not None and not compared["low"] <= 0 <= compared["high"]:
        better = (compared["mean"] > 0) == (quantity == "score")
    return Row((*cells, f"{compared['mean']:+.4f}", _range(compared), *p_values), better)


def _range(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f"{entry['low']:.4f} to {entry['high']:.4f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """List the remarks that the scores need: overlap with the training text, and other notes."""
    overlap = [f"overlap: {name}: {_overlap(found)}" for name, found in result["overlap"].items()]
    return overlap + [f"note: {note}" for note in result["notes"]]


def _overlap(overlap: Mapping[str, Any]) -> str:
    if overlap["found"] is None:
        text = "not measured; name the raw text in the suite's unlabelled_text"
    else:
        share = overlap["found"] / overlap["examples"]
        text = f"{overlap['found']:,} of {overlap['examples']:,} scored examples ({share:.1%})"
        text += " share eight words in a row with the unlabelled text"
    if overlap["excluded_from"]:
        text += f"; their documents were left out of {', '.join(overlap['excluded_from'])}"
    elif overlap["found"]:
        text += "; shard_corpus.py --exclude leaves such documents out"
    return text


def trade_off(result: Mapping[str, Any]) -> list[tuple[str, list[float], list[float]]]:
    """Return label, domain and general losses of each model that has both, for ``comparison_figure``."""
    return [
        (label, model["domain_loss"]["values"], model["general_loss"]["values"])
        for label, model in result["models"].items()
        if "domain_loss" in model and "general_loss" in model
    ]


def scores_html(result: Mapping[str, Any]) -> str:
    """Return the evaluation as a part of the page."""
    rows = []
    for title, of_models in score_sections(result["models"]):
        rows.append(f'<tr class="group"><td colspan="{len(COLUMNS)}">{escape(title)}</td></tr>')
        rows += [f"<tr>{_cells(row)}</tr>" for row in of_models]
    sentences = [f"Against {result['base']}; coloured where the interval of the difference leaves 0 out."]
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in [*sentences, *remarks(result)])
    picture = ""
    if points := trade_off(result):
        caption = "held-out domain loss against general loss of the evaluated models"
        picture = html.figures([(caption, lambda theme: plots.comparison_figure(points, theme=theme))])
    return html.table(COLUMNS, rows) + paragraphs + picture


def _cells(row: Row) -> str:
    cells = [f"<td>{escape(cell)}</td>" for cell in row.cells]
    if row.better is not None:
        kind = "better" if row.better else "worse"
        cells[4] = cells[4].replace("<td>", f'<td class="{kind}">')
    return "".join(cells)
