"""A run folder, read back, and the honest summary of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dga_scale.config.declaration import shown
from dga_scale.config.methods import known_settings
from dga_scale.errors import UserError
from dga_scale.logging.evaluations import BeforeAfter, Texts, before_and_after, history, last_texts
from dga_scale.logging.json_lines import read_log
from dga_scale.preservation.importance import Importance
from dga_scale.run_folder import LOG_FILE, RunFolder, read_settings
from dga_scale.storage.checked_json import load_object
from dga_scale.storage.typed_json import check_fields


@dataclass(frozen=True)
class Change:
    """A held-out loss (nats a predicted token) before and after the run."""

    before: float
    after: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def relative(self) -> float:
        return self.difference / self.before if self.before else math.nan


@dataclass(frozen=True)
class RunData:
    """A run, finished or not, as its folder describes it."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    """Empty where there is no environment.json."""
    summary: dict[str, Any]
    """Empty as long as the run is not finished."""
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    importance: dict[str, Tensor]
    """kind -> (layers, units); empty for a method without importance."""
    protection: dict[str, Tensor]
    importance_after: dict[str, Tensor]
    """The same for the domain, after training; empty for a method that does not measure it."""

    @property
    def label(self) -> str:
        """The method and the soft-mask: ``dga, update``."""
        method = str(self.settings.get("method", "?"))
        mask = self.settings.get("soft_mask", "none")
        return method if mask == "none" else f"{method}, {mask}"

    @property
    def corpora(self) -> str:
        """The text that the run was trained on, as a reader would name it."""
        value = self.settings.get("corpus")
        names = [str(each) for each in (value if isinstance(value, list) else [value])]
        mix = self.settings.get("mix") or []
        mix = mix if isinstance(mix, list) else [mix]
        return " and ".join(names) + (f" (mixed with {', '.join(mix)})" if mix else "")

    @property
    def last_step(self) -> int:
        return max((r["step"] for r in self.steps), default=0)

    def named(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one name, in order."""
        return [r for r in self.events if r["event"] == event]

    def losses(self, text: str) -> list[tuple[int, float]]:
        """Return steps and losses on the ``"domain"`` or ``"general"`` text of the last evaluation."""
        return history(self.events, text)

    def before_and_after(self, text: str) -> BeforeAfter | None:
        """Return the loss on that text of the base model, where it was measured, and of the trained one."""
        return before_and_after(self.events).get(f"{text}_loss")

    def change(self, text: str) -> Change | None:
        """Return the loss on that text before and after training; None where one was not measured."""
        found = self.before_and_after(text)
        return None if found is None or found.before is None else Change(found.before, found.after)

    @property
    def texts(self) -> Texts:
        """The texts that the last evaluation scored."""
        return last_texts(self.events)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a logged number, NaN where it was none; empty if never logged."""
        found = [(r["step"], r[key]) for r in self.steps if key in r]
        return [s for s, _ in found], [math.nan if v is None else v for _, v in found]

    def typical(self, key: str) -> float | None:
        """Return the median over the steps after the first tenth, which starts caches and compilers."""
        values = [v for v in self.series(key)[1][len(self.steps) // 10 :] if math.isfinite(v)]
        return median(values) if values else None

    def peak_memory(self) -> list[float]:
        """Return the peak GiB of each rank over all steps; a run may have resumed on other ranks."""
        rows = [r["memory_gib"] for r in self.steps if r.get("memory_gib")]
        return [max(of_rank) for of_rank in zip_longest(*rows, fillvalue=0.0)]

    def last_of_kinds(self, event: str) -> dict[str, dict[str, Any]]:
        """Return the last event of one name of each of its kinds."""
        return {record["kind"]: record for record in self.named(event)}

    def effective_protection(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the last 1 - a and relative movement, each (layers, units), of kinds with few units."""
        return {
            kind: (_matrix(record["one_minus_a"]), _matrix(record["movement"]))
            for kind, record in self.last_of_kinds("protection").items()
            if "movement" in record
        }


def _matrix(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows])


def load_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: It is no run folder, or a file in it is damaged (named).
    """
    run, log = RunFolder(folder), folder / LOG_FILE
    if not run.config.is_file():
        inside = sorted(str(config.parent) for config in folder.glob(f"*/{run.config.name}"))
        fix = f"Give the runs in it: {' '.join(inside)}." if inside else "Give the --output_dir of a run."
        raise UserError(f"no run folder: it holds no {run.config.name}. {fix}", folder)
    if not log.is_file():
        raise UserError(
            f"nothing to report yet: the run has not written {log.name}, which has its first evaluation and "
            "its steps. Wait for them, or start its command again if it has stopped.",
            folder,
        )
    settings = read_settings(run.config)
    records = read_log(log)
    importance: dict[str, Tensor] = {}
    protection: dict[str, Tensor] = {}
    if run.importance.is_file():
        measured = Importance.load(run.importance)
        importance = measured.values
        squash = settings.get("importance_squash", "clip")
        if words := known_settings()["importance_squash"].problem(squash):
            raise UserError(f"importance_squash is {shown(squash)}, and must be {words}", run.config)
        protection = measured.protection(squash)
    after = run.importance_after
    return RunData(
        name=folder.resolve().name,
        settings=settings,
        environment=_json(run.environment),
        summary=_json(run.summary, {"tokens": int}),
        steps=[r for r in records if "event" not in r],
        events=[r for r in records if "event" in r],
        importance=importance,
        protection=protection,
        importance_after=Importance.load(after).values if after.is_file() else {},
    )


def _json(path: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = load_object(path)
        check_fields(content, kinds or {})
    except (OSError, ValueError) as error:
        raise UserError(f"damaged ({error}). Remove it to report without it.", path) from None
    return content


def summarize_run(run: RunData) -> str:
    """Summarise a run in plain words: its gain in the domain and the cost outside."""
    domain, general = run.change("domain"), run.change("general")
    if domain is None and (found := run.before_and_after("domain")) is not None:
        return (
            f"Loss on held-out domain text is {found.after:.3f}. Nothing can be said about what was learnt: "
            "the base model was not measured on this text. It is another one, or another number of its rows, "
            "than the run began with."
        )
    if domain is None:
        return (
            "Nothing can be said about the domain: the run has no two evaluations on held-out domain text. "
            "Pass --eval_corpus, or shard with --validation_share."
        )
    sentence = f"Loss on held-out domain text {_describe_change(domain)}."
    if domain.difference >= 0:
        sentence += " The run did not make the model better in the domain."
    if general is None and run.before_and_after("general") is not None:
        return (
            f"{sentence} Nothing can be said about forgetting: the base model was not measured on the "
            "general text that the trained one was."
        )
    if general is None:
        return (
            f"{sentence} General loss was not measured, so nothing can be said about forgetting: pass "
            "--general_eval_corpus."
        )
    sentence += f" Loss on general text {_describe_change(general)}"
    if general.difference <= 0:
        sentence += ": nothing measured outside the domain was lost."
    elif domain.difference < 0:
        price = general.difference / -domain.difference
        sentence += f": each nat gained in the domain cost {price:.2f} outside it."
    else:
        sentence += "."
    return sentence


def _describe_change(change: Change) -> str:
    word = "fell" if change.difference < 0 else "rose"
    size = f"{abs(change.difference):.3f} ({abs(change.relative):.1%})"
    return f"{word} by {size}, from {change.before:.3f} to {change.after:.3f}"


def summarize_errors(run: RunData) -> list[str]:
    """Say how sure each importance is that the run protects by or has measured."""
    return [
        f"{run.name}: importance ({record['loss']}) of {record['examples']:,} rows: largest standard error "
        f"of a {record['largest_error_of_a']:.2f} ({record['kind']})."
        for record in run.named("importance")
    ]


def summarize_protection(run: RunData) -> str | None:
    """Summarise whether the soft-mask held its units; None without one, or where no unit is protected."""
    sentences = []
    undone = False
    for kind, record in run.last_of_kinds("protection").items():
        if "protected_units" not in record:
            continue
        target, measured = 1 - record["target_protection"], 1 - record["measured_protection"]
        sentences.append(
            f"The {record['protected_units']} most protected {kind} moved {measured:.2f} of what unprotected "
            f"ones moved; the target of their soft-masks is {target:.2f}."
        )
        undone |= measured > (1 + target) / 2
    if not sentences:
        return None
    if undone and run.settings.get("soft_mask") == "gradient":
        adam = run.settings.get("optimizer", "adamw") == "adamw"
        why = ": Adam divides a constant factor on the gradient out again" if adam else ""
        sentences.append(f"The mask did little{why}. --soft_mask update applies it to the step instead.")
    return f"{run.name}: {' '.join(sentences)}"
