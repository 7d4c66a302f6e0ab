"""Groups of runs that differ in their seed only: means, spreads, and their comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean, stdev

from dga_scale.config.comparison import experiment
from dga_scale.report.run_data import Change, RunData


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: its mean, and the sample standard deviation (None with one seed)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        """Format the figure for a table: ``3.921 ± 0.004``."""
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Group:
    """Finished runs of one experiment with domain and general losses before and after.

    Attributes:
        label: The method, and the settings in which it differs from others of that method.
        runs: The runs, one a seed.

    """

    label: str
    runs: tuple[RunData, ...]

    def changes(self) -> list[tuple[Change, Change]]:
        """The domain and general losses of each run."""
        found = [(run.change("domain"), run.change("general")) for run in self.runs]
        return [(domain, general) for domain, general in found if domain and general]

    def after(self, text: str) -> Figure:
        """Return the loss on held-out ``"domain"`` or ``"general"`` text at the end."""
        return Figure.of([change.after for change in self._of(text)])

    def change(self, text: str) -> Figure:
        """Return the change of that loss."""
        return Figure.of([change.difference for change in self._of(text)])

    def _of(self, text: str) -> list[Change]:
        return [domain if text == "domain" else general for domain, general in self.changes()]

    @property
    def tokens(self) -> int | None:
        return self.runs[0].summary.get("tokens")

    @property
    def plain(self) -> bool:
        """Whether the group is the baseline: the LM loss alone, on the domain alone."""
        settings = self.runs[0].settings
        return settings.get("method") == "mlm" and not settings.get("mix")


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """Group the runs whose losses were measured, in the order they came in."""
    measured = [run for run in runs if run.change("domain") and run.change("general")]
    keys = [repr((sorted(experiment(run.settings).items()), run.texts)) for run in measured]
    order = sorted(range(len(measured)), key=lambda i: keys.index(keys[i]))
    groups = [tuple(measured[i] for i in same) for _, same in groupby(order, key=lambda i: keys[i])]
    return [Group(_label(group[0], [other[0] for other in groups]), group) for group in groups]


def _label(run: RunData, all_runs: Sequence[RunData]) -> str:
    """Return the method, and the settings in which it differs from its other groups."""
    alike = [other for other in all_runs if other.label == run.label and other is not run]
    own, others = experiment(run.settings), [experiment(other.settings) for other in alike]
    differs = [name for name in run.settings if any(own.get(name) != other.get(name) for other in others)]
    return ", ".join([run.label, *(f"{name} {_short(run.settings[name])}" for name in differs)])


def _short(value: object) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(str(each).rstrip("/").rsplit("/", 1)[-1] for each in values)


def on_same_text(groups: Sequence[Group]) -> bool:
    """Return whether all runs were evaluated on the same domain text and the same general text."""
    scored = [[group.runs[0].texts[text] for text in ("domain", "general")] for group in groups]
    return all(texts == scored[0] for texts in scored)


def comparison(groups: Sequence[Group]) -> str | None:
    """Compare the methods with plain MLM, in words; None where there is nothing to compare."""
    if len(groups) < 2:
        return None
    if not on_same_text(groups):
        return "The runs were evaluated on different text, so their losses can't be compared."
    best_domain = min(groups, key=lambda group: group.after("domain").mean)
    best_general = min(groups, key=lambda group: group.after("general").mean)
    sentences = [
        f"Best in the domain: {best_domain.label} ({best_domain.after('domain')}).",
        f"Best on general text: {best_general.label} ({best_general.after('general')}).",
    ]
    if len({group.tokens for group in groups}) > 1:
        sentences.append("The runs saw different numbers of tokens, so this is no fair comparison.")
        return " ".join(sentences)
    for base in (group for group in groups if group.plain):
        others = [group for group in groups if not group.plain]
        sentences += [f"{group.label} {_against(group, base)}." for group in others]
    return " ".join(sentences)


def _against(group: Group, base: Group) -> str:
    keeps = group.after("general").mean < base.after("general").mean
    learns = group.after("domain").mean < base.after("domain").mean
    if keeps and learns:
        return "beats plain MLM on both"
    if keeps or learns:
        gain, loss = ("general text", "the domain") if keeps else ("the domain", "general text")
        return f"is better than plain MLM on {gain} and not on {loss}"
    return "does not beat plain MLM at equal tokens, neither in the domain nor on general text"
