"""The terminal: one line a logged step, and a progress bar where it is one."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dga_scale.errors import one_line
from dga_scale.logging.logger import LoggedRun, Logger, Numbers

_LINE_UNITS: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "grad_norm": ("grad norm {:.3f}", max),
    "learning_rate": ("lr {:.2e}", max),
    "tokens_per_second": ("{:,.0f} tokens/s", sum),
    "data_wait_seconds": ("data wait {:.3f} s", max),
    "step_seconds": ("step {:.2f} s", max),
    "memory_gib": ("memory {:.2f} GiB", max),
    "mfu": ("MFU {:.1%}", max),
}
"""How the terminal's line writes a value, and what it makes of one number a rank."""


class Terminal(Logger):
    """The logger that prints lines above a progress bar; every run has one, on rank 0."""

    def __init__(self, run: LoggedRun) -> None:
        super().__init__(run, self.print)
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=self._console, transient=True,
            disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=run.total_steps, completed=run.completed_steps)

    def progress(self, step: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def step(self, step: int, numbers: Numbers) -> None:
        if "loss/total" in numbers:
            self._bar.update(self._task, description=f"loss {numbers['loss/total']:.3f}")
        self.print(step_line(step, self.run.total_steps, numbers))

    def print(self, text: str) -> None:
        self._console.print("\n".join(map(one_line, text.split("\n"))))

    def close(self) -> None:
        self._bar.stop()


def step_line(step: int, total_steps: int, numbers: Numbers) -> str:
    """Format a step's line: step, losses, grad norm, learning rate, tokens/s, data wait, time, memory."""
    parts = [f"step {step}/{total_steps}"]
    losses = {name.removeprefix("loss/"): v for name, v in numbers.items() if name.startswith("loss/")}
    others = {name: v for name, v in numbers.items() if not name.startswith("loss/")}
    if losses:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "total")
        total = f"loss {losses['total']:.4f}" if "total" in losses else "loss"
        parts.append(f"{total} ({terms})" if terms else total)
    for name in sorted(others, key=lambda name: (*_LINE_UNITS, name).index(name)):
        form, combine = _LINE_UNITS.get(name, (name + " {:.4g}", max))
        value = others[name]
        parts.append(form.format(combine(value) if isinstance(value, Sequence) else value))
    return "  ".join(parts)
