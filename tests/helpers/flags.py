"""Flags of commands."""

from collections.abc import Iterable


def changed(flags: Iterable[str], *more: str) -> list[str]:
    """``flags``, with ``more`` in place of those of the same names: a command takes each once."""
    names = {word.split("=")[0] for word in more if word.startswith("--")}
    kept, left_out = [], False
    for word in flags:
        if word.startswith("--"):
            left_out = word.split("=")[0] in names
        if not left_out:
            kept.append(word)
    return [*kept, *more]
