"""The interface of a logger: where a run's figures go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a reader of a log needs neither matplotlib nor torch
    from matplotlib.figure import Figure
    from torch import Tensor

Numbers = Mapping[str, float | list[float]]
"""By name a number, or a list with one of each rank."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger writes about.

    Attributes:
        folder: The folder of the run.
        total_steps: The number of optimizer steps of the whole run.
        completed_steps: The steps done by the checkpoint that the run resumes from: what was logged after
            them is written anew. 0: a new run.

    """

    folder: Path
    total_steps: int
    completed_steps: int = 0


class Logger:
    """A logger, which writes a run's figures to one destination; rank 0 has one of each that the run names.

    Each method does nothing unless it is overridden. To add a logger, derive from this class in a module of
    its own and name it in ``loggers.LOGGERS``.

    Args:
        run: The run that is written about.
        say: The function that prints a line on the terminal, for a logger in trouble: it must not end the
            run.

    """

    def __init__(self, run: LoggedRun, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say

    def step(self, step: int, numbers: Numbers) -> None:
        """Write the numbers of an optimizer step that is logged."""

    def progress(self, step: int) -> None:
        """Count an optimizer step, whether or not it is logged."""

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Write an event that is no step, as an evaluation or a checkpoint; values are what JSON can hold."""

    def print(self, text: str) -> None:
        """Show a line to people."""

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of the run."""

    def outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Write the outcome of the run, beside its settings."""

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Write a picture."""

    def histogram(self, name: str, values: "Tensor", step: int) -> None:
        """Write the distribution of values of any shape."""

    def close(self) -> None:
        """Write what is left and release everything."""
