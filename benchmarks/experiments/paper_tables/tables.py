"""The comparison so far: scores, losses, what is larger than noise, and the papers' rows beside ours."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml

from benchmarks.common import settled_steps, table
from benchmarks.experiments.paper_tables.jobs import Work
from benchmarks.experiments.paper_tables.settings import label
from dga_scale.corpus.shards import MANIFEST, Corpus
from dga_scale.endtasks.significance import Difference, difference, ratio_difference
from dga_scale.endtasks.suite import BASE
from dga_scale.logging.json_lines import read_log
from dga_scale.report.scores import RESULTS
from dga_scale.run_folder import LOG_FILE, write_text

NONE = "none"
"""The base's name in the tables: no adaptation."""

MISSING = "missing"

KINDS = ("domain", "general")
"""The kinds of text and of tasks."""

Rows = list[list[str]]


def write_tables(work: Work) -> Path:
    """Write ``tables.md``, and return its path."""
    found = Found(work)
    parts = []
    for part in (scores, losses, differences, costs, movement):
        title, text, rows = part(found)
        if len(rows) > 1:
            parts.append(f"## {title}\n\n{text}\n\n{table(rows)}")
    parts += [*sequence(work), *excluded(work)]
    parts += [published(found, content) for content in load_published().values()]
    path = work.output / "tables.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def load_published() -> dict[str, dict[str, Any]]:
    """Return the papers' numbers by table: ``source``, ``size``, ``columns``, and ``rows`` of texts."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


class Found:
    """The results that tools/evaluate.py has written so far."""

    def __init__(self, work: Work) -> None:
        self.work, self.settings = work, work.settings
        self.methods = [NONE, *self.settings.methods]
        self.domains = list(self.settings.domains)
        self.domain_task = {name: Path(each.task).name for name, each in self.settings.domains.items()}
        self.general_tasks = [Path(task).name for task in self.settings.general.tasks]
        self._models = {domain: self._read(domain) for domain in self.domains}

    def _read(self, domain: str) -> dict[str, dict[str, Any]]:
        file = self.work.evaluation(domain) / RESULTS
        return json.loads(file.read_text(encoding="utf-8"))["models"] if file.exists() else {}

    def entries(self, domain: str, method: str, group: str) -> dict[str, Any]:
        """Return a model's entries of results.json: its "tasks" or "corpora"; empty as long as unmeasured."""
        return self._models[domain].get(_label(method), {group: {}})[group]

    def values(self, domain: str, method: str, task: str) -> list[float]:
        """Return a model's scores by seed."""
        return self.entries(domain, method, "tasks").get(task, {"values": []})["values"]

    def sums(self, domain: str, method: str) -> dict[str, dict[str, list[float]]]:
        """Return the losses by batch of held-out text, of the first training seed."""
        file = self.work.evaluation(domain) / _label(method) / "held_out.json"
        return json.loads(file.read_text(encoding="utf-8"))["sums"] if file.exists() else {}


def scores(found: Found) -> tuple[str, str, Rows]:
    """Compare the scores of end tasks."""
    if not found.settings.tasks():
        return "End tasks", "", []
    first, heads = found.domains[0], {}
    for domain in found.domains:
        for task in (found.domain_task[domain], *found.general_tasks):
            entry = found.entries(domain, NONE, "tasks").get(task)
            heads[task] = f"{task}, {entry['metric']}" if entry else task
    rows = [["method", *(f"{d}: {heads[found.domain_task[d]]}" for d in found.domains), "average"]]
    rows[0] += [heads[task] for task in found.general_tasks]
    counts = set()
    for method in found.methods:
        own = [found.values(domain, method, found.domain_task[domain]) for domain in found.domains]
        counts |= {len(values) for values in own if values}
        average = f"{100 * fmean(map(fmean, own)):.1f}" if all(own) else MISSING
        rows.append([method, *map(_points, own), average])
        for task in found.general_tasks:
            # The base is the same model in all domains.
            models = [first] if method == NONE else found.domains
            rows[-1].append(_points([v for domain in models for v in found.values(domain, method, task)]))
    text = (
        f"Points, mean ± standard deviation over {' or '.join(map(str, sorted(counts)))} "
        f"{'fine-tuning' if len(found.settings.seeds) == 1 else 'training'} seeds; general tasks over "
        "those of all domains' models."
    )
    return "End tasks", text, rows


def losses(found: Found) -> tuple[str, str, Rows]:
    """Compare the held-out losses."""
    rows = [["method", *(f"{domain}: {kind}" for domain in found.domains for kind in KINDS)]]
    for method in found.methods:
        cells = []
        for domain in found.domains:
            entries = found.entries(domain, method, "corpora").values()
            cells += [next((_loss(e) for e in entries if e["kind"] == kind), MISSING) for kind in KINDS]
        rows.append([method, *cells])
    text = (
        "Nats a predicted token, of several training seeds ± half their range; in brackets the difference to "
        "the base, of one seed with half its 95% interval over batches of text."
    )
    return "Held-out losses", text, rows


def differences(found: Found) -> tuple[str, str, Rows]:
    """Test paired differences to the method that all are compared with, and to the base, over all domains."""
    other = found.settings.compare_with
    references = [NONE, *([other] if other else [])] if found.settings.tasks() else []
    rows = [["method", *(f"{kind} tasks: to {r}" for r in references for kind in KINDS)]]
    rows[0] += [f"{kind} loss: to {other}" for kind in KINDS if other]
    for method in found.methods[1:]:
        cells = [_tasks_cell(found, method, reference, kind) for reference in references for kind in KINDS]
        rows.append([method, *cells, *(_losses_cell(found, method, other, kind) for kind in KINDS if other)])
    text = (
        "Mean difference, 95% interval, p of a paired t-test, number of pairs. Tasks, in points: a pair is "
        "one seed on one task of one domain, and shows the seeds' noise only, another training seed gives "
        "another model. Losses: pairs are batches of held-out text of all domains, first training seed."
    )
    return "What is larger than noise", text, rows


def costs(found: Found) -> tuple[str, str, Rows]:
    """Compare time and memory of the trainings' steps."""
    first = next(iter(found.settings.trained()))
    rows = [["method", "step, s", f"/ {first}'s", "memory of a rank, GiB", f"/ {first}'s"]]
    reference: list[float] = []
    for method in found.settings.trained():
        runs = (found.work.run(d, method, seed) for d, seed in product(found.domains, found.settings.seeds))
        steps = [step for run in runs if (run / LOG_FILE).exists() for step in settled_steps(run)]
        if steps:
            seconds = median(step["step_seconds"] for step in steps)
            figures = [seconds, max(max(step["memory_gib"]) for step in steps)]
            reference = reference or figures
            pairs = zip(figures, reference, strict=True)
            rows.append([method, *(f"{each:.2f}" for own, other in pairs for each in (own, own / other))])
    text = (
        "Median of the steps of all trainings of a method but the first three of each, and their most memory."
    )
    return "Cost", text, rows


def movement(found: Found) -> tuple[str, str, Rows]:
    """Set how far protected units moved beside what their masks ask for."""
    rows = [["method", *found.domains]]
    for method in found.settings.trained():
        cells = []
        for domain in found.domains:
            runs = (found.work.run(domain, method, seed) for seed in found.settings.seeds)
            cells.append("; ".join(filter(None, map(_protection, runs))))
        if any(cells):
            rows.append([method, *(cell or MISSING for cell in cells)])
    text = (
        "Heads with a soft-mask below 0.5: the mean movement that their masks ask for, and how far they "
        "moved, both relative to heads without a mask (1 - `target_protection` and 1 - `measured_protection` "
        "in the runs' logs)."
    )
    return "Effective protection", text, rows


def sequence(work: Work) -> Iterator[str]:
    """Yield the losses and end-task scores after each domain of a sequence."""
    settings = work.settings
    for method in settings.sequence.methods if settings.sequence else ():
        for seed in settings.seeds:
            run = work.sequence_run(method, seed)
            files = [run / name for name in ("sequence.json", "forgetting.json")]
            if all(file.exists() for file in files):
                found, scored = (json.loads(file.read_text(encoding="utf-8")) for file in files)
                rate = scored["forgetting_rate"]
                yield (
                    f"## In sequence: {method}, seed {seed}\n\n{table(_sequence_rows(found, scored))}\n\n"
                    f"Forgetting rate: {100 * rate['mean']:+.1f} points over {len(rate['by_seed'])} seeds."
                )


def excluded(work: Work) -> Iterator[str]:
    """Yield how many end-task examples stood in the text before their documents were dropped."""
    lines = []
    for name in [*work.settings.domains, "general"] if work.settings.tasks() else ():
        if (work.corpus(name) / MANIFEST).exists():
            files = Corpus.open(work.corpus(name)).manifest.excluded
            counts = (f"{f.found} of {f.examples} of {Path(f.path).parent.name}" for f in files)
            lines.append(f"- {name}: {', '.join(counts)}")
    if lines:
        yield "## End-task examples in the text\n\nTheir documents were left out.\n\n" + "\n".join(lines)


def published(found: Found, content: Mapping[str, Any]) -> str:
    """Return a paper's table; where it has our domains, ours beside it, with gains over no adaptation."""
    columns = content["columns"]
    rows = [["published", *columns]]
    for name, each in content["rows"].items():
        rows.append([name, *each["values"], *[""] * (len(columns) - len(each["values"]))])
    parts = [f"## Published: {content['source']}", content["size"], table(rows)]
    domains = [
        domain for domain in columns if domain in found.domains and found.entries(domain, NONE, "tasks")
    ]
    if domains:
        flags, work = found.settings.training, found.settings
        parts.append(
            f"Beside ours, with the gain over no adaptation. Ours: {Path(work.model).name}, "
            f"{flags['max_steps'] * flags['global_batch_size']:,} sequences of "
            f"{work.sharding.get('sequence_length', 512)} tokens a domain, {len(work.seeds)} training and "
            f"{work.evaluation.seeds} fine-tuning seeds. The model, the text and the splits of the tasks "
            "differ: directions can be compared, heights can't."
        )
        parts.append(table(_beside(found, content, domains)))
    return "\n\n".join(parts)


def _beside(found: Found, content: Mapping[str, Any], domains: Sequence[str]) -> Rows:
    rows = [["", *(f"{domain}: {whose}" for domain in domains for whose in ("published", "ours"))]]
    first = next(iter(content["rows"].values()))
    for name, each in content["rows"].items():
        method = each.get("ours")
        if method not in found.methods:
            continue
        rows.append([f"{name}; {method}"])
        for domain in domains:
            at, task = content["columns"].index(domain), found.domain_task[domain]
            theirs = [float(row["values"][at].split("/")[0]) for row in (each, first)]
            ours = [found.values(domain, m, task) for m in (method, NONE)]
            rows[-1] += [_gain(*theirs), _gain(*(100 * fmean(v) for v in ours)) if all(ours) else MISSING]
    return rows


def _label(method: str) -> str:
    return BASE if method == NONE else label(method)


def _gain(value: float, before: float) -> str:
    return f"{value:.1f}" + ("" if value == before else f" ({value - before:+.1f})")


def _points(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def _loss(entry: Mapping[str, Any]) -> str:
    compared, values, text = entry["difference"], entry["values"], f"{entry['loss']['mean']:.3f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.3f}"
    if compared is None:
        return text
    known = len(values) == 1 and compared["high"] is not None
    half = f" ± {compared['high'] - compared['mean']:.3f}" if known else ""
    return f"{text} ({compared['mean']:+.3f}{half})"


def _difference(found: Difference, scale: float, digits: int) -> str:
    text = f"{scale * found.mean:+.{digits}f}"
    if found.low is not None and found.high is not None:
        text += f" [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"
    if found.p_t is not None:
        text += f", p {found.p_t:.3f}" if found.p_t >= 0.001 else ", p < 0.001"
    return f"{text}, n {found.count}"


def _tasks_cell(found: Found, method: str, reference: str, kind: str) -> str:
    """Compare the scores on tasks of a kind; a pair is a seed, a domain and a task."""
    values: list[float] = []
    others: list[float] = []
    for domain in found.domains:
        for task in [found.domain_task[domain]] if kind == "domain" else found.general_tasks:
            mine, theirs = (found.values(domain, each, task) for each in (method, reference))
            if mine and theirs:
                if reference == NONE and len(found.settings.seeds) > 1:
                    theirs = [fmean(theirs)] * len(mine)
                values += mine
                others += theirs
    return _difference(difference(values, others), 100, 1) if values and method != reference else ""


def _losses_cell(found: Found, method: str, reference: str, kind: str) -> str:
    """Compare the losses on text of a kind; a pair is a batch."""
    columns: tuple[list[float], ...] = [], [], []  # sums of both, labels
    for domain in found.domains:
        mine, theirs = (found.sums(domain, each) for each in (method, reference))
        for name in mine if theirs else ():
            if (name == domain) == (kind == "domain"):
                columns[0].extend(mine[name]["loss"])
                columns[1].extend(theirs[name]["loss"])
                columns[2].extend(mine[name]["labels"])
    return _difference(ratio_difference(*columns), 1, 3) if columns[0] and method != reference else ""


def _protection(run: Path) -> str:
    """Return the movement that masks on heads ask for and the one found, last in a run's log."""
    log = read_log(run / LOG_FILE) if (run / LOG_FILE).exists() else []
    events = [each for each in log if each.get("kind") == "heads" and "measured_protection" in each]
    if not events or events[-1]["measured_protection"] is None:  # NaN
        return ""
    return f"{1 - events[-1]['target_protection']:.2f}, {1 - events[-1]['measured_protection']:.2f}"


def _sequence_rows(found: Mapping[str, Any], scored: Mapping[str, Any]) -> Rows:
    domains = found["domains"]
    names = [f"{domain}, {metric}" for domain, metric in zip(domains, scored["metrics"], strict=True)]
    rows = [["after", *(f"loss {domain}" for domain in domains), "general loss", *names]]
    for number, domain in enumerate(domains):
        values = [found["losses"][other][number] for other in domains]
        values.append(found["general"][number + 1] if found.get("general") else None)
        rows.append([domain, *("" if value is None else f"{value:.3f}" for value in values)])
        rows[-1] += [f"{100 * score['mean']:.1f}" for score in scored["scores"][number]]
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
    return rows
