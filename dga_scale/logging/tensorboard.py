"""TensorBoard: curves, pictures, settings and outcome of a run, in ``tensorboard/`` of its folder."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dga_scale.logging import plots
from dga_scale.logging.logger import LoggedRun, Logger, Numbers
from dga_scale.run_folder import RunFolder


class TensorBoard(Logger):
    """The logger that writes TensorBoard's event files; where it can't, it warns once and stops.

    Numbers of a step have their names, those of ranks ``NAME/rankN``; numbers of events are ``EVENT/NAME``,
    or ``EVENT/KIND/NAME`` where the event is of some kind; those of a list have its indices after them.
    """

    def __init__(self, run: LoggedRun, say: Callable[[str], None]) -> None:
        super().__init__(run, say)
        # TensorBoard drops what an interrupted run wrote at and after purge_step, the evaluation before its
        # first step included where it begins again.
        purge = run.completed_steps + 1 if run.completed_steps else 0
        self._folder = RunFolder(run.folder).tensorboard
        self._writer: SummaryWriter | None = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=30)

    def step(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            if isinstance(value, list):
                for rank, number in enumerate(value):
                    self._scalar(f"{name}/rank{rank}", number, step)
            else:
                self._scalar(name, value, step)

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        prefix = f"{name}/{values['kind']}" if "kind" in values else name
        for key, value in values.items():
            numbered = enumerate(value) if isinstance(value, list) else [("", value)]
            for index, number in numbered:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    self._scalar(f"{prefix}/{key}/{index}".rstrip("/"), number, step)

    def settings(self, settings: Mapping[str, Any]) -> None:
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
        text = f"| setting | value |\n|---|---|\n{rows}"
        self._draw(lambda board: board.add_text("settings", text, self.run.completed_steps))

    def outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        if not figures:
            return
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        metrics = {f"outcome/{name}": value for name, value in figures.items()}
        step = self.run.total_steps
        self._draw(lambda board: board.add_hparams(plain, metrics, run_name=".", global_step=step))

    def figure(self, name: str, figure: Figure, step: int) -> None:
        pixels = plots.pixels(figure)
        self._draw(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self._draw(lambda board: board.add_histogram(name, values, step))

    def close(self) -> None:
        self._draw(SummaryWriter.close)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._draw(lambda board: board.add_scalar(name, value, step))

    def _draw(self, call: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            call(self._writer)
        except OSError as error:
            self._writer = None
            self.say(f"{self._folder} can't be written ({error.strerror}): no more curves; log.jsonl has all")
