"""One self-contained HTML page about one run or several: no network, no script, light and dark, any width."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dga_scale
from dga_scale.config.declaration import as_typed
from dga_scale.errors import UserError
from dga_scale.logging import plots
from dga_scale.logging.evaluations import NOT_MEASURED, BeforeAfter, perplexity
from dga_scale.report import html
from dga_scale.report.groups import Group, comparison, grouped, on_same_text
from dga_scale.report.html import Draw
from dga_scale.report.run_data import (
    Change,
    RunData,
    load_run,
    summarize_errors,
    summarize_protection,
    summarize_run,
)
from dga_scale.report.scores import load_scores, scores_html
from dga_scale.storage.atomic import replace_file

_LIGHT_FIGURE = re.compile(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">')


def write_report(
    runs: Sequence[str | Path],
    output: str | Path,
    figures: Path | None = None,
    evaluation: Path | None = None,
) -> None:
    """Write the page about ``runs`` (run folders), side by side where there are several.

    Each file appears whole or not at all.

    Args:
        runs: The run folders.
        output: The page.
        figures: A folder that gets the page's figures, numbered, as PNG files.
        evaluation: The folder that tools/evaluate.py wrote about the models, for a section of scores.

    Raises:
        UserError: A folder is no run folder or no evaluation, a file in it is damaged, or ``output`` can't be
            written.
    """
    scores = None if evaluation is None else load_scores(evaluation)
    page = render([load_run(Path(run)) for run in runs], scores)
    try:
        replace_file(Path(output), page.encode(errors="backslashreplace"))
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
            for number, (data, caption) in enumerate(_LIGHT_FIGURE.findall(page), 1):
                name = re.sub(r"[^a-z0-9]+", "-", unescape(caption).lower())[:60].strip("-")
                replace_file(figures / f"{number:02d}-{name}.png", base64.b64decode(data))
    except OSError as error:
        raise UserError(f"{error.strerror}. Give a path in a folder you own.", error.filename) from None


def render(runs: Sequence[RunData], scores: Mapping[str, Any] | None = None) -> str:
    """Return the page as a string. All text from the runs is escaped; images are inlined."""
    title = ", ".join(run.name for run in runs)
    sections = [
        _outcome(runs),
        html.section("Scores", scores_html(scores) if scores else ""),
        html.section("Losses", _losses(runs)),
        html.section("Importance and protection", _importance(runs)),
        html.section("Effective protection", _effective_protection(runs)),
        html.section("Experts", _experts(runs)),
        html.section("Speed and memory", _speed(runs)),
        html.section("Settings", _settings(runs)),
        html.section("Environment", _environment(runs)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: domain adaptation</title>\n<style>{html.STYLE}</style>\n</head>\n"
        "<body>\n<main>\n"
        f"<h1>Domain adaptation: {escape(title)}</h1>\n"
        + "".join(f'<p class="muted">{escape(_one_line(run))}</p>\n' for run in runs)
        + "".join(sections)
        + f'<p class="muted">Written by dga_scale {dga_scale.__version__}. A loss is the mean cross-entropy '
        "in nats of the predicted tokens of held-out text; perplexity is its exponential.</p>\n"
        "</main>\n</body>\n</html>\n"
    )


def _one_line(run: RunData) -> str:
    s = run.settings
    tokens = f", {run.summary['tokens']:,} tokens" if "tokens" in run.summary else ""
    total = s.get("max_steps")
    state = f"{total} steps" if run.last_step == total else f"step {run.last_step} of {total}, not finished"
    return f"{run.name}: {s.get('model')} adapted to {run.corpora} by {run.label}; {state}{tokens}."


def _outcome(runs: Sequence[RunData]) -> str:
    groups = grouped(runs)
    sentences = [compared] if (compared := comparison(groups)) else []
    sentences += [
        summarize_run(run) if len(runs) == 1 else f"{run.name}: {summarize_run(run)}" for run in runs
    ]
    if any(len(group.runs) == 1 for group in groups):
        sentences.append("One seed a method: differences of a few hundredths can be chance.")
    rows = []
    for text in ("domain", "general"):
        measured = [(run, found) for run in runs if (found := run.before_and_after(text))]
        if len(runs) > 1 and measured:
            rows.append(f'<tr class="group"><td colspan="4">{text}</td></tr>')
        rows += [_change_row(run.name if len(runs) > 1 else text, found) for run, found in measured]
    head = ("held-out text", "before", "after", "change")
    compared = _methods(groups) if len(groups) > 1 else ""
    return f'<div class="summary">\n{_paragraphs(sentences)}</div>\n{compared}{html.table(head, rows)}'


def _methods(groups: Sequence[Group]) -> str:
    """Return the table of methods over their seeds: domain and general losses."""
    rows = []
    for group in groups:
        cells = [str(group.after(text)) for text in ("domain", "general")]
        changes = [f"{group.change(text).mean:+.3f}" for text in ("domain", "general")]
        values = (cells[0], changes[0], cells[1], changes[1], str(len(group.runs)))
        rows.append(f"<tr><td>{escape(group.label)}</td>{html.cells(values)}</tr>")
    head = ("method", "domain loss", "change", "general loss", "change", "seeds")
    if not on_same_text(groups):
        return html.table(head, rows)
    before = [(d.before, g.before) for group in groups for d, g in group.changes()]
    # Runs of one base start from the same losses, measured again by each.
    points = [("before", [before[0][0]], [before[0][1]])] + [
        (group.label, [d.after for d, _ in group.changes()], [g.after for _, g in group.changes()])
        for group in groups
    ]
    caption = "what was learnt against what was kept: left is better in the domain, low outside it"
    picture = html.figures([(caption, lambda theme: plots.comparison_figure(points, theme=theme))])
    return html.table(head, rows) + picture


def _change_row(name: str, found: BeforeAfter) -> str:
    def loss(value: float) -> str:
        found = perplexity(value)
        return f"<td>{value:.3f}<small>{'' if found is None else f'ppl {found:,.1f}'}</small></td>"

    if found.before is None:
        return f"<tr><td>{escape(name)}</td><td>{NOT_MEASURED}</td>{loss(found.after)}<td></td></tr>"
    change = Change(found.before, found.after)
    kind = "better" if change.difference < 0 else "worse"
    difference = f'<td class="{kind}">{change.difference:+.3f}<small>{change.relative:+.1%}</small></td>'
    return f"<tr><td>{escape(name)}</td>{loss(change.before)}{loss(change.after)}{difference}</tr>"


def _losses(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        names = dict.fromkeys(k for r in runs[0].steps for k in r if k.startswith("loss/"))
        training = {name.removeprefix("loss/"): runs[0].series(name) for name in names}
        held_out = {
            "held-out loss": _points({"domain": (runs[0], "domain"), "general": (runs[0], "general")})
        }
    else:
        training = {run.name: series for run in runs if (series := run.series("loss/mlm"))[0]}
        held_out = {
            f"held-out {text} loss": _points({run.name: (run, text) for run in runs})
            for text in ("domain", "general")
        }
    figures: list[tuple[str, Draw]] = []
    if training:
        which = "training loss" if len(runs) == 1 else "training loss of the masked LM"
        figures.append((which, lambda theme: plots.curves_figure(training, "loss", theme=theme)))
    for title, points in held_out.items():
        if points:
            figures.append((title, _dots(points)))
    return html.figures(figures)


def _points(wanted: dict[str, tuple[RunData, str]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the held-out losses by label, where any were measured."""
    found = {}
    for label, (run, text) in wanted.items():
        if losses := run.losses(text):
            found[label] = ([step for step, _ in losses], [loss for _, loss in losses])
    return found


def _dots(points: plots.Series) -> Draw:
    return lambda theme: plots.curves_figure({}, "loss", points=points, theme=theme)


def _importance(runs: Sequence[RunData]) -> str:
    figures = []
    for run in runs:
        for kind, values in run.importance.items():
            if not plots.can_be_drawn(values):
                continue
            a = run.protection[kind]
            shown: list[tuple[str, torch.Tensor, tuple[float, float] | None]] = [
                ("importance for general knowledge", values, None),
                ("protection a (the soft-mask is 1 - a)", a, (0.0, 1.0)),
            ]
            if kind in run.importance_after:
                after = run.importance_after[kind]
                shown.append(("importance for the domain, after training", after, None))
            for what, matrix, limits in shown:
                caption = f"{run.name}: {what}, {kind}" if len(runs) > 1 else f"{what}, {kind}"
                figures.append((caption, _heatmap(matrix, kind, limits)))
    return _paragraphs(text for run in runs for text in summarize_errors(run)) + html.figures(figures)


def _paragraphs(sentences: Iterable[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences)


def _heatmap(values: torch.Tensor, kind: str, limits: tuple[float, float] | None) -> Draw:
    return lambda theme: plots.heatmap_figure(values, "", kind, limits=limits, theme=theme)


def _effective_protection(runs: Sequence[RunData]) -> str:
    found = {run.name: run.effective_protection() for run in runs}
    figures = []
    for kind in dict.fromkeys(kind for by_kind in found.values() for kind in by_kind):
        caption = (
            f"each dot is one of the {kind}: the movement of its own rows, beside the target of its mask"
        )
        units = {name: by_kind[kind] for name, by_kind in found.items() if kind in by_kind}
        figures.append((caption, _protection_dots(units, kind)))
    sentences = [text for run in runs if (text := summarize_protection(run))]
    return _paragraphs(sentences) + html.figures(figures)


def _experts(runs: Sequence[RunData]) -> str:
    """Return the table of the experts of each sublayer, as the end of the run left them."""
    rows = []
    for run in runs:
        for place, record in run.last_of_kinds("cse").items():
            name = place if len(runs) == 1 else f"{run.name}: {place}"
            shares = ", ".join(f"{share:.1%}" for share in record["share"])
            moved = ", ".join(f"{radii:.2f}" for radii in record["centre_moved"])
            rows.append(f"<tr>{html.cells((name, shares, moved))}</tr>")
    return html.table(("experts", "share of the sequences, at the end", "centres moved, in radii"), rows)


def _protection_dots(units: dict[str, tuple[torch.Tensor, torch.Tensor]], kind: str) -> Draw:
    return lambda theme: plots.protection_figure(units, kind, theme=theme)


def _speed(runs: Sequence[RunData]) -> str:
    def number(run: RunData, key: str, form: str) -> str:
        value = run.typical(key)
        return "" if value is None else form.format(value)

    def share_waiting(run: RunData) -> str:
        pairs = zip(run.series("data_wait_seconds")[1], run.series("step_seconds")[1], strict=True)
        shares = [wait / seconds for wait, seconds in pairs if seconds]
        return f"{median(shares):.1%}" if shares else ""

    rows: list[tuple[str, list[str]]] = [
        ("tokens a second", [number(r, "tokens_per_second", "{:,.0f}") for r in runs]),
        ("seconds a step", [number(r, "step_seconds", "{:.2f}") for r in runs]),
        ("of it waiting for data", [share_waiting(r) for r in runs]),
        ("model FLOPs utilisation", [number(r, "mfu", "{:.1%}") for r in runs]),
        ("memory of each rank, GiB", [", ".join(f"{m:.2f}" for m in r.peak_memory()) for r in runs]),
        ("steps refused for NaN or infinity", [str(len(r.named("refused"))) for r in runs]),
    ]
    table = html.table(
        ("median of the steps", *(run.name for run in runs)),
        [f"<tr><td>{what}</td>{html.cells(values)}</tr>" for what, values in rows if any(values)],
    )
    curves = {run.name: run.series("tokens_per_second") for run in runs if run.series("tokens_per_second")[0]}
    if not curves:
        return table
    return table + html.figures(
        [("tokens a second", lambda theme: plots.curves_figure(curves, "tokens a second", theme=theme))]
    )


def _settings(runs: Sequence[RunData]) -> str:
    return _side_by_side("setting", [run.settings for run in runs], runs, "all settings")


def _environment(runs: Sequence[RunData]) -> str:
    flat = [
        {
            key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            for key, value in run.environment.items()
        }
        for run in runs
    ]
    return _side_by_side("", flat, runs, "versions and devices") if any(flat) else ""


def _side_by_side(what: str, columns: Sequence[dict[str, Any]], runs: Sequence[RunData], summary: str) -> str:
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [as_typed(column.get(name)) for column in columns]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(f"<tr{differs}><td>{escape(name)}</td>{html.cells(values)}</tr>")
    table = html.table((what, *(run.name for run in runs)), rows, "settings")
    return f"<details><summary>{summary}</summary>\n{table}</details>\n"
