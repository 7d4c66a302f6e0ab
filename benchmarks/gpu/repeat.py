"""What runs of the real program logged of their steps, and whether two of them are equal bit for bit."""

import statistics
from pathlib import Path
from typing import Any, TypeVar

from dga_scale.logging.json_lines import read_log

SETTLED = 10
"""Steps of the Trainer and of the real program that are not counted."""

T = TypeVar("T")


def settled(steps: list[T]) -> list[T]:
    """Return the steps that are counted, the last one at least."""
    return steps[min(SETTLED, len(steps) - 1) :]


def settled_steps(folder: Path) -> list[dict[str, Any]]:
    """Return what a run logged of the steps that are counted."""
    return settled(_steps(folder))


def compared(one: Path, other: Path) -> dict[str, Any]:
    """Compare two runs: the first step with another loss or norm (None: none), whether models are equal."""
    pairs = list(zip(_steps(one), _steps(other), strict=True))
    names = [name for name in pairs[0][0] if name.startswith("loss/") or name == "grad_norm"]
    differing = (mine["step"] for mine, its in pairs if any(mine[name] != its[name] for name in names))
    models = [(folder / "model" / "model.safetensors").read_bytes() for folder in (one, other)]
    return {
        "steps": len(pairs),
        "first_difference": next(differing, None),
        "same_model": models[0] == models[1],
        "step_seconds": statistics.median(step["step_seconds"] for step in settled_steps(other)),
    }


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(folder / "log.jsonl") if "step_seconds" in record]
