"""The comparison so far: scores, losses, what is larger than noise, and the papers' rows beside ours."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.experiments.paper_tables.jobs import Work
from benchmarks.experiments.paper_tables.settings import label
from dga_scale.corpus.shards import MANIFEST, Corpus
from dga_scale.endtasks.evaluate import BASE
from dga_scale.endtasks.significance import Difference, difference, ratio_difference
from dga_scale.report.scores import RESULTS
from dga_scale.run_folder import write_text

NONE = "none"
"""The base's name in the tables: no adaptation."""

MISSING = "missing"

Rows = list[list[str]]


def write_tables(work: Work) -> Path:
    """Write ``tables.md``; gives its path."""
    found = Found(work)
    parts = [
        f"## {title}\n\n{text}\n\n{table(rows)}"
        for title, text, rows in (scores(found), losses(found), differences(found), movement(found))
        if len(rows) > 1
    ]
    parts += [*sequence(work), *excluded(work)]
    parts += [published(found, name, content) for name, content in load_published().items()]
    path = work.output / "tables.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def load_published() -> dict[str, dict[str, Any]]:
    """The papers' numbers by table: ``source``, ``size``, ``columns``, and ``rows`` of texts."""
    content: dict[str, dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    )
    return content


class Found:
    """What tools/evaluate.py has written so far."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.evaluations: dict[str, dict[str, Any]] = {}
        for domain in work.settings.domains:
            own, general = (work.evaluation(kind, domain) / RESULTS for kind in ("domain", "general"))
            if own.exists():
                self.evaluations[domain] = json.loads(own.read_text(encoding="utf-8"))["models"]
            if own.exists() and general.exists():
                for name, model in json.loads(general.read_text(encoding="utf-8"))["models"].items():
                    self.evaluations[domain][name]["tasks"] |= model["tasks"]

    @property
    def methods(self) -> list[str]:
        return [NONE, *self.work.settings.methods]

    def tasks(self, domain: str) -> tuple[str, list[str]]:
        """The domain's task, and the general ones."""
        settings = self.work.settings
        return Path(settings.domains[domain].task).name, [Path(task).name for task in settings.general.tasks]

    def entry(self, domain: str, method: str, group: str, name: str) -> dict[str, Any] | None:
        """Of results.json; None where it is not there yet."""
        model = self.evaluations.get(domain, {}).get(BASE if method == NONE else label(method), {})
        return model.get(group, {}).get(name)

    def values(self, domain: str, method: str, task: str) -> list[float] | None:
        """A model's scores by seed."""
        entry = self.entry(domain, method, "tasks", task)
        return None if entry is None else entry["values"]

    def sums(self, domain: str, method: str) -> dict[str, dict[str, list[float]]] | None:
        """Losses by batch of held-out text, of the first training seed."""
        folder = self.work.evaluation("domain", domain) / (BASE if method == NONE else label(method))
        file = folder / "held_out.json"
        return json.loads(file.read_text(encoding="utf-8"))["sums"] if file.exists() else None


def scores(found: Found) -> tuple[str, str, Rows]:
    """Scores of end tasks."""
    domains = list(found.work.settings.domains)
    general = found.tasks(domains[0])[1]
    metrics = {}
    for domain in domains:
        for task in (found.tasks(domain)[0], *general):
            entry = found.entry(domain, NONE, "tasks", task)
            metrics[task] = f"{task}, {entry['metric']}" if entry else task
    rows = [["method", *(f"{d}: {metrics[found.tasks(d)[0]]}" for d in domains), "average"]]
    rows[0] += [metrics[task] for task in general]
    counts = set()
    for method in found.methods:
        own = [found.values(domain, method, found.tasks(domain)[0]) for domain in domains]
        counts |= {len(values) for values in own if values}
        cells = [_points(values) for values in own]
        complete = [statistics.fmean(values) for values in own if values]
        cells.append(f"{100 * statistics.fmean(complete):.1f}" if len(complete) == len(own) else MISSING)
        for task in general:
            values = [v for domain in domains for v in found.values(domain, method, task) or []]
            # The base is the same model in all domains.
            cells.append(_points(found.values(domains[0], method, task) if method == NONE else values))
        rows.append([method, *cells])
    text = (
        f"Points, mean ± standard deviation over {' or '.join(map(str, sorted(counts)))} "
        f"{'fine-tuning' if len(found.work.settings.seeds) == 1 else 'training'} seeds; general tasks over "
        "those of all domains' models."
    )
    return "End tasks", text, rows


def losses(found: Found) -> tuple[str, str, Rows]:
    """Held-out losses."""
    domains = list(found.work.settings.domains)
    rows = [["method", *(f"{domain}{what}" for domain in domains for what in (": domain", ": general"))]]
    for method in found.methods:
        cells = []
        for domain in domains:
            model = found.evaluations.get(domain, {}).get(BASE if method == NONE else label(method))
            for kind in ("domain", "general"):
                entries = [e for e in (model or {"corpora": {}})["corpora"].values() if e["kind"] == kind]
                cells.append(_loss(entries[0]) if entries else MISSING)
        rows.append([method, *cells])
    text = (
        "Nats a predicted token; in brackets the difference to the base and half its 95% interval, over "
        "batches of text for one training seed, over models for several."
    )
    return "Held-out losses", text, rows


def differences(found: Found) -> tuple[str, str, Rows]:
    """Paired differences to the method that all are compared with, and to the base, over all domains."""
    settings = found.work.settings
    other = settings.compare_with
    references = [NONE, *([other] if other else [])]
    rows = [["method", *(f"{kind} tasks: to {r}" for r in references for kind in ("domain", "general"))]]
    if other:
        rows[0] += [f"{kind} loss: to {other}" for kind in ("domain", "general")]
    for method in found.methods[1:]:
        cells = []
        for reference in references:
            for kind in ("domain", "general"):
                pairs = _pairs(found, method, reference, kind) if method != reference else ([], [])
                cells.append(_difference(difference(*pairs), 100, 1) if pairs[0] else "")
        if other:
            found_losses = _loss_differences(found, method, other) if method != other else []
            cells += [
                _difference(ratio_difference(*columns), 1, 3) if columns else "" for columns in found_losses
            ] or ["", ""]
        rows.append([method, *cells])
    text = (
        "Mean difference, 95% interval, p of a paired t-test, number of pairs. Tasks, in points: a pair is "
        "one seed on one task of one domain, and shows the seeds' noise only, another training seed gives "
        "another model. Losses: pairs are batches of held-out text of all domains, first training seed."
    )
    return "What is larger than noise", text, rows


def movement(found: Found) -> tuple[str, str, Rows]:
    """How far protected units moved, against what their masks ask for."""
    settings = found.work.settings
    rows = [["method", *settings.domains]]
    for method, flags in settings.methods.items():
        if "merge" in flags:
            continue
        cells = []
        for domain in settings.domains:
            events = [_protection(found.work.run(domain, method, seed)) for seed in settings.seeds]
            cells.append("; ".join(f"{e[0]:.2f}, {e[1]:.2f}" for e in events if e))
        if any(cells):
            rows.append([method, *(cell or MISSING for cell in cells)])
    text = (
        "Heads with a soft-mask below 0.5: the mean movement that their masks ask for, and how far they "
        "moved, both relative to heads without a mask (1 - `target_protection` and 1 - `measured_protection` "
        "in the runs' logs)."
    )
    return "Effective protection", text, rows


def sequence(work: Work) -> Iterator[str]:
    """Losses and end-task scores after each domain of a sequence."""
    settings = work.settings
    for method in settings.sequence.methods if settings.sequence else ():
        for seed in settings.seeds:
            run = work.sequence_run(method, seed)
            files = [run / name for name in ("sequence.json", "forgetting.json")]
            if all(file.exists() for file in files):
                found, scored = (json.loads(file.read_text(encoding="utf-8")) for file in files)
                rate = scored["forgetting_rate"]
                points = f"{100 * rate['mean']:+.1f} points over {len(rate['by_seed'])} seeds"
                yield "\n\n".join(
                    [
                        f"## In sequence: {method}, seed {seed}",
                        table(_sequence_rows(found, scored)),
                        f"Forgetting rate: {points}.",
                    ]
                )


def excluded(work: Work) -> Iterator[str]:
    """How many end-task examples stood in the text before their documents were dropped."""
    lines = []
    for name in [*work.settings.domains, "general"]:
        if (work.corpus(name) / MANIFEST).exists():
            files = Corpus.open(work.corpus(name)).manifest.excluded
            found = ", ".join(
                f"{f['found']} of {f['examples']} of {Path(f['path']).parent.name}" for f in files
            )
            lines.append(f"- {name}: {found}")
    if lines:
        yield "## End-task examples in the text\n\nTheir documents were left out.\n\n" + "\n".join(lines)


def published(found: Found, name: str, content: Mapping[str, Any]) -> str:
    """A paper's table; where it has our domains, ours beside it, with gains over no adaptation."""
    rows = [["published", *content["columns"]]]
    rows += [[row, *each["values"]] for row, each in content["rows"].items()]
    parts = [f"## Published: {content['source']}", content["size"], table(rows)]
    domains = [domain for domain in content["columns"] if domain in found.evaluations]
    if domains:
        parts += [_size(found.work), table(_beside(found, content, domains))]
    return "\n\n".join(parts)


def table(rows: Rows) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in (row + [""] * (len(rows[0]) - len(row)) for row in rows)]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _beside(found: Found, content: Mapping[str, Any], domains: Sequence[str]) -> Rows:
    rows = [["", *(f"{domain}: {whose}" for domain in domains for whose in ("published", "ours"))]]
    first = next(iter(content["rows"].values()))
    for name, each in content["rows"].items():
        method = each.get("ours")
        if method not in found.methods:
            continue
        cells = []
        for domain in domains:
            at = content["columns"].index(domain)
            theirs, theirs_before = (float(row["values"][at].split("/")[0]) for row in (each, first))
            task = found.tasks(domain)[0]
            ours, ours_before = (found.values(domain, m, task) for m in (method, NONE))
            cells.append(_gain(theirs, theirs_before))
            cells.append(
                _gain(100 * statistics.fmean(ours), 100 * statistics.fmean(ours_before))
                if ours and ours_before
                else MISSING
            )
        rows.append([f"{name}; {method}", *cells])
    return rows


def _size(work: Work) -> str:
    flags = work.settings.training
    sequences = flags["max_steps"] * flags["global_batch_size"]
    return (
        f"Beside ours, with the gain over no adaptation. Ours: {Path(work.settings.model).name}, "
        f"{sequences:,} sequences of {work.settings.sharding.get('sequence_length', 512)} tokens a domain, "
        f"{len(work.settings.seeds)} training and {work.settings.evaluation.seeds} fine-tuning seeds. The "
        "model, the text and the splits of the tasks differ: directions can be compared, heights can't."
    )


def _gain(value: float, before: float) -> str:
    return f"{value:.1f}" + ("" if value == before else f" ({value - before:+.1f})")


def _points(values: Sequence[float] | None) -> str:
    if not values:
        return MISSING
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _loss(entry: Mapping[str, Any]) -> str:
    compared = entry["difference"]
    if compared is None:
        return f"{entry['loss']['mean']:.3f}"
    half = "" if compared["high"] is None else f" ± {compared['high'] - compared['mean']:.3f}"
    return f"{entry['loss']['mean']:.3f} ({compared['mean']:+.3f}{half})"


def _difference(found: Difference, scale: float, digits: int) -> str:
    text = f"{scale * found.mean:+.{digits}f}"
    if found.low is not None and found.high is not None:
        text += f" [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"
    if found.p_t is not None:
        text += f", p {found.p_t:.3f}" if found.p_t >= 0.001 else ", p < 0.001"
    return f"{text}, n {found.count}"


def _pairs(found: Found, method: str, reference: str, kind: str) -> tuple[list[float], list[float]]:
    values: list[float] = []
    others: list[float] = []
    for domain in found.evaluations:
        own, general = found.tasks(domain)
        for task in [own] if kind == "domain" else general:
            mine, theirs = found.values(domain, method, task), found.values(domain, reference, task)
            if mine and theirs:
                if reference == NONE and len(found.work.settings.seeds) > 1:
                    theirs = [statistics.fmean(theirs)] * len(mine)
                values += mine
                others += theirs
    return values, others


def _loss_differences(found: Found, method: str, reference: str) -> list[list[list[float]]]:
    """Sums of losses of both, and counts, over the batches of all domains: of domain and general text."""
    columns: list[list[list[float]]] = [[[], [], []], [[], [], []]]
    for domain in found.evaluations:
        mine, theirs = found.sums(domain, method), found.sums(domain, reference)
        if mine and theirs:
            for name, sums in mine.items():
                into = columns[name != domain]
                for column, values in zip(
                    into, (sums["loss"], theirs[name]["loss"], sums["labels"]), strict=True
                ):
                    column += values
    return columns if columns[0][0] else []


def _protection(run: Path) -> tuple[float, float] | None:
    """Movement asked for and found, of the last such line in the log."""
    file = run / "log.jsonl"
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line.get("kind") == "heads" and "measured_protection" in line]
    if not found:
        return None
    asked, moved = 1 - found[-1]["target_protection"], 1 - found[-1]["measured_protection"]
    return None if math.isnan(moved) else (asked, moved)


def _sequence_rows(found: Mapping[str, Any], scored: Mapping[str, Any]) -> Rows:
    domains = found["domains"]
    names = [f"{domain}, {metric}" for domain, metric in zip(domains, scored["metrics"], strict=True)]
    rows = [["after", *(f"loss {domain}" for domain in domains), "general loss", *names]]
    for number, domain in enumerate(domains):
        values = [found["losses"][other][number] for other in domains]
        general = found["general"][number + 1] if found.get("general") else None
        cells = ["" if value is None else f"{value:.3f}" for value in (*values, general)]
        cells += [f"{100 * score['mean']:.1f}" for score in scored["scores"][number]]
        rows.append([domain, *cells])
    return rows
