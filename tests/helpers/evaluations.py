"""Evaluations as a run's log has them."""

from typing import Any


def evaluation(
    step: int, rows: int = 10, texts: dict[str, str] | None = None, **losses: float
) -> dict[str, Any]:
    """Write one of losses by name; ``texts``: the text that each stands for, by default one of that name."""
    named = {name: (texts or {}).get(name, name) for name in losses}
    return {
        "event": "evaluation",
        "step": step,
        **{f"{name}_loss": loss for name, loss in losses.items()},
        "texts": {name: {"content_hash": f"hash of {text}", "rows": rows} for name, text in named.items()},
    }
