"""The log of a run: the numbers of its steps, read from the device when due and passed to the loggers.

Rank 0 has loggers; a log without any, as the other ranks have it, says nothing and reads nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from dga_scale.logging import plots
from dga_scale.logging.json_lines import JsonLines
from dga_scale.logging.logger import LoggedRun, Logger
from dga_scale.logging.loggers import DEFAULT, LOGGERS, check_loggers
from dga_scale.logging.records import PROTECTION
from dga_scale.logging.terminal import Terminal

T = TypeVar("T")

Value = float | int | Tensor | Sequence[float]
"""A logged value: one number, one number a rank, or a tensor of either: a scalar, or (ranks,)."""


def open_log(
    folder: str | Path,
    rank: int,
    total_steps: int,
    *,
    completed_steps: int = 0,
    logging_steps: int = 1,
    loggers: Sequence[str] | None = None,
) -> "RunLog":
    """Open the log of a run on one rank.

    Args:
        folder: The run's folder, where ``log.jsonl`` and the loggers' files lie.
        rank: The rank; only rank 0 writes, the others' log is silent.
        total_steps: The number of optimizer steps of the whole run.
        completed_steps: The number of steps of the checkpoint that the run resumes from; 0: a new log.
        logging_steps: The interval of logged steps; see ``RunLog``.
        loggers: The names in ``LOGGERS``, beside ``log.jsonl`` and the terminal; None: ``DEFAULT``.

    Raises:
        UserError: A name that is not there, or a damaged ``log.jsonl`` of the run that is resumed.

    """
    names = DEFAULT if loggers is None else loggers
    check_loggers(names)
    run = LoggedRun(Path(folder), total_steps, completed_steps)
    if rank > 0:
        return RunLog((), run, logging_steps=logging_steps)
    run.folder.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(run)
    lines = JsonLines(run, terminal.print)
    return RunLog(
        [terminal, lines, *(LOGGERS[name](run, terminal.print) for name in names)],
        run,
        logging_steps=logging_steps,
    )


def silent_log() -> "RunLog":
    """Make a log that writes nothing, for work that is no run."""
    return RunLog((), LoggedRun(Path(), 0))


class RunLog:
    """The log of a run on one rank.

    Args:
        loggers: The loggers that everything is passed to, in this order; none: a silent log.
        run: The run that is logged.
        logging_steps: The interval of logged steps: one is read (which waits for the device) and logged when
            it is a multiple of this, the first or the last.

    """

    def __init__(self, loggers: Sequence[Logger], run: LoggedRun, *, logging_steps: int = 1) -> None:
        self._loggers = tuple(loggers)
        self._run = run
        self._logging_steps = logging_steps

    @property
    def active(self) -> bool:
        """Whether the log writes anything: on rank 0."""
        return bool(self._loggers)

    @property
    def folder(self) -> Path:
        """The run's folder, where ``log.jsonl`` lies."""
        return self._run.folder

    def logs(self, step: int) -> bool:
        """Return whether the values of ``step`` are read and written (on every rank alike)."""
        ends = self._run.completed_steps + 1, self._run.total_steps
        return step % self._logging_steps == 0 or step in ends

    def step(self, values: Mapping[str, Value]) -> None:
        """Log one finished optimizer step.

        Tensors are read only if the step is logged, all of them in one transfer; between logged steps nothing
        waits for the device.

        Args:
            values: ``"step"`` and the measured values, under the names used throughout: ``loss/total``,
                ``loss/NAME``, ``grad_norm``, ``learning_rate``, ``tokens_per_second``, ``data_wait_seconds``,
                ``step_seconds``, ``mfu``, ``memory_gib`` (one number a rank).
        """
        if not self.active:
            return
        step = int(values["step"])  # type: ignore[arg-type]  # never a sequence
        for logger in self._loggers:
            logger.progress(step)
        if not self.logs(step):
            return
        numbers = read_values(values)
        for logger in self._loggers:
            logger.step(step, numbers)

    def event(self, name: str, *, step: int, **values: Any) -> None:
        """Log an event that is no step: an evaluation, a checkpoint, a refused step.

        Values are what JSON can hold. Nothing is printed: say it with :meth:`print` in words.
        """
        for logger in self._loggers:
            logger.event(name, step, values)

    def print(self, text: str) -> None:
        """Print a line on rank 0's terminal, above the progress bar."""
        for logger in self._loggers:
            logger.print(text)

    def track(self, items: Iterable[T], total: int, name: str) -> Iterator[T]:
        """Pass ``items`` on, with a line on rank 0's terminal after each tenth of ``total``."""
        for number, item in enumerate(items, start=1):
            yield item
            if 10 * number // total > 10 * (number - 1) // total:
                self.print(f"{name}: {number}/{total}")

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Log the settings of the run."""
        for logger in self._loggers:
            logger.settings(settings)

    def outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Log the outcome of the run, beside its settings."""
        for logger in self._loggers:
            logger.outcome(settings, figures)

    def importance(self, importance: Mapping[str, Tensor], protection: Mapping[str, Tensor]) -> None:
        """Log each kind's importance and protection, as heatmaps and as the histogram of the soft-mask.

        The heatmaps are written to ``importance-KIND.png`` in the run's folder too. A kind with too many
        units a layer for a heatmap has a histogram of its importance instead.

        Args:
            importance: The mean ``|gradient|`` of the gates, (layers, units) by kind.
            protection: The ``a`` of the soft-mask ``1 - a``, (layers, units) by kind.
        """
        if not self.active:
            return
        step = self._run.completed_steps
        for kind, a in protection.items():
            if plots.can_be_drawn(importance[kind]):
                figure = plots.importance_figure(importance[kind], a, kind)
                path = self.folder / f"importance-{kind}.png"
                try:
                    plots.save_png(figure, path)
                except OSError as error:
                    self.print(f"{path} can't be written ({error.strerror})")
                for logger in self._loggers:
                    logger.figure(f"importance/{kind}", figure, step)
            else:
                for logger in self._loggers:
                    logger.histogram(f"importance/{kind}", importance[kind].float(), step)
            for logger in self._loggers:
                logger.histogram(f"soft_mask/{kind}", 1 - a.float(), step)

    def importance_errors(
        self, kind: str, *, step: int, relative: Tensor, of_a: Tensor, **figures: str | float
    ) -> None:
        """Log the standard errors of a kind's importance.

        Written as the event ``importance`` of that ``kind``; with the matrices where a layer has few enough
        units.

        Args:
            kind: The kind of unit.
            step: The number of finished optimizer steps.
            relative: (layers, units), the standard error of each importance over that importance.
            of_a: (layers, units), the standard error of each ``a`` of the soft-mask ``1 - a``.
            figures: How the importance was measured.
        """
        matrices = {}
        if plots.can_be_drawn(of_a):
            matrices = {"relative_error": _rounded(relative), "error_of_a": _rounded(of_a)}
        largest = {"largest_error_of_a": of_a.max().item(), "mean_relative_error": relative.mean().item()}
        self.event("importance", step=step, kind=kind, **largest, **figures, **matrices)

    def protection(
        self, kind: str, *, step: int, one_minus_a: Tensor, movement: Tensor, **figures: float
    ) -> None:
        """Log the movement of each unit of a kind since the start, beside the target of its mask.

        Written as the event ``protection`` of that ``kind``, with its figures; with the matrices and a
        picture where a layer has few enough units.

        Args:
            kind: The kind of unit.
            step: The number of finished optimizer steps.
            one_minus_a: (layers, units), the factor of the soft-mask.
            movement: (layers, units), movement of the unit's own rows since the start relative to that of
                unprotected units: near ``one_minus_a`` where the mask works, near 1 everywhere
                where the optimizer undoes it.
            figures: The numbers about all units of the kind.
        """
        if not self.active:
            return
        matrices = {}
        if plots.can_be_drawn(movement):
            matrices = {"one_minus_a": _rounded(one_minus_a), "movement": _rounded(movement)}
            figure = plots.protection_figure({"": (one_minus_a, movement)}, kind)
            for logger in self._loggers:
                logger.figure(f"protection/{kind}", figure, step)
        self.event(PROTECTION, step=step, kind=kind, **figures, **matrices)

    def close(self) -> None:
        """Finish the files and take the progress bar off the terminal."""
        for logger in reversed(self._loggers):
            logger.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_values(values: Mapping[str, Value]) -> dict[str, float | list[float]]:
    """Read the numbers of ``values`` (without ``"step"``), tensors in one transfer from the device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name != "step"}
    numbers: dict[str, float | list[float]] = {}
    if tensors:
        device = next(iter(tensors.values())).device
        flat = torch.cat([t.detach().reshape(-1).to(device, torch.float32) for t in tensors.values()])
        read = iter(flat.tolist())
        for name, tensor in tensors.items():
            numbers[name] = list(islice(read, len(tensor))) if tensor.dim() else next(read)
    for name, value in values.items():
        if name == "step" or isinstance(value, Tensor):
            continue
        if isinstance(value, int | float):
            numbers[name] = value
        else:
            numbers[name] = [float(v) for v in value]
    return numbers


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix.float().tolist()]
