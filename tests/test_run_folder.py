"""docs/run_folder.md against real runs: all they write is on the page, and the page names nothing else."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, run_and_draw

PAGE = (REPOSITORY / "docs" / "run_folder.md").read_text(encoding="utf-8")
SELDOM = {"head.safetensors", "experts.json", "save_failed", "refused", "cse", "error", "in_a_row"}
"""What only a run writes that has no LM head, has experts, or meets a fault: other tests see it."""
PLACES = {
    "KIND": r"[a-z_]+",
    "NNNNNN": r"\d{6}",
    "NNNNN": r"\d{5}",
    "NAME": r"[a-z_0-9]+",
    "SOURCE": r"[\w-]+",
}


def _table(heading: str) -> list[list[str]]:
    """The rows of a section's table, cell by cell."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def _names(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def _matches(found: str, documented: str) -> bool:
    pattern = re.escape(documented.rstrip("/")) + (r"(/.*)?" if documented.endswith("/") else "")
    for place, characters in PLACES.items():
        pattern = pattern.replace(place, characters)
    return re.fullmatch(pattern, found) is not None


def _compare(found: set[str], documented: set[str]) -> None:
    unknown = {name for name in found if not any(_matches(name, each) for each in documented)}
    assert not unknown, f"not on the page: {sorted(unknown)}"
    stale = {each for each in documented - SELDOM if not any(_matches(name, each) for name in found)}
    assert not stale, f"on the page, written by no run: {sorted(stale)}"


@pytest.fixture(scope="module")
def runs(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    settings = {
        "das": {"method": "das", "soft_mask": "update", "mix": f"{world.general_corpus}:0.2", "max_steps": 2},
        "ewc": {
            "method": "ewc",
            "general_corpus": world.general_corpus,
            "fisher_samples": 8,
            "max_steps": 2,
            "dropout": 0.1,
        },
    }
    for name, values in settings.items():
        assert run_ranks(2, run_and_draw, arguments(world, root / name, **values)) == [0, 0]
    return [root / name for name in settings]


def test_files(runs: list[Path]) -> None:
    found = {path.relative_to(run).as_posix() for run in runs for path in run.rglob("*") if path.is_file()}
    documented = {name for file, _ in _table("Files") for name in _names(file)}
    _compare(found, documented)


def test_steps_and_events(runs: list[Path]) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for line in (run / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            found[record.pop("event", "")] |= record.keys()
    steps = {name for row in _table("Steps in log.jsonl") for name in _names(row[0])}
    _compare(found.pop(""), steps | {"loss/mlm/SOURCE"})
    events = {next(iter(_names(event))): _names(keys) for event, keys in _table("Events in log.jsonl")}
    _compare(set(found), set(events))
    for event, keys in found.items():
        _compare(keys, {name for name in events[event] if re.fullmatch(r"\w+", name)} | {"step"})
