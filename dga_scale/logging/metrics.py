"""What a run says while it trains: log.jsonl, TensorBoard, one line a step and one progress bar.

Only rank 0 writes; on the other ranks every call returns at once. ``log.jsonl``, one JSON object a line::

    {"step": 12, "loss/total": 3.51, "loss/mlm": 3.2, "learning_rate": 1e-4, ...}     a step that was logged
    {"event": "checkpoint", "step": 500, "path": "runs/acl/checkpoints/step-000500"}    anything else

``step`` counts finished optimizer steps, from 1; events before the first step have step 0. A value that is
NaN or infinite is ``null`` there (JSON has no other word for it) and spelt out in the line on the terminal.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dga_scale.errors import UserError
from dga_scale.logging import plots
from dga_scale.storage.atomic import replace_file

T = TypeVar("T")

Value = float | int | Tensor | Sequence[float]
"""One number, one number a rank, or a tensor of either: a scalar, or (ranks,)."""

LOG_FILE = "log.jsonl"
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


class RunLog:
    """The log of a run on one rank.

    Args:
        run_dir: the run's folder; ``log.jsonl`` and ``tensorboard/`` are written in it.
        rank: only rank 0 writes.
        total_steps: optimizer steps of the whole run, for the progress bar.
        completed_steps: steps already done by the checkpoint the run goes on from. Records after it are cut
            off ``log.jsonl``, so the file reads as that of a run that was never interrupted. 0: a new log.
        logging_steps: a step is read (which waits for the device) and logged when it is a multiple of this,
            the first or the last.

    Raises:
        UserError: ``log.jsonl`` of the run that is gone on with holds a line that is no JSON object.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        total_steps: int,
        *,
        completed_steps: int = 0,
        logging_steps: int = 1,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.completed_steps = completed_steps
        self.logging_steps = logging_steps
        self.active = rank == 0
        if not self.active:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        truncate_log(self.run_dir / LOG_FILE, completed_steps)
        # Unbuffered: what does not fit on the disk is kept here, and written when it does.
        self._file = open(self.run_dir / LOG_FILE, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._unwritten, self._warned = b"", False
        # TensorBoard drops what the interrupted run wrote at and after purge_step.
        purge = completed_steps + 1 if completed_steps else None
        self._board = _Board(str(self.run_dir / "tensorboard"), purge, self.print)
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=self._console, transient=True,
            disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total_steps, completed=completed_steps)

    def logs(self, step: int) -> bool:
        """Whether ``step`` is one whose values are read and written (on every rank alike)."""
        return step % self.logging_steps == 0 or step in (self.completed_steps + 1, self.total_steps)

    def step(self, values: Mapping[str, Value]) -> None:
        """Log one finished optimizer step.

        Tensors are read only if the step is logged, all of them in one transfer; between logged steps nothing
        waits for the device.

        Args:
            values: ``"step"`` and what was measured, under the names used throughout: ``loss/total``,
                ``loss/NAME``, ``grad_norm``, ``learning_rate``, ``tokens_per_second``, ``data_wait_seconds``,
                ``step_seconds``, ``mfu``, ``memory_gib`` (one number a rank).
        """
        if not self.active:
            return
        step = int(values["step"])  # type: ignore[arg-type]  # never a sequence
        self._bar.start()
        self._bar.update(self._task, completed=step)
        if not self.logs(step):
            return
        numbers = read_values(values)
        self._write({"step": step} | numbers)
        for name, value in numbers.items():
            self._scalar(name, value, step)
        if "loss/total" in numbers:
            self._bar.update(self._task, description=f"loss {numbers['loss/total']:.3f}")
        self.print(step_line(step, self.total_steps, numbers))

    def event(self, name: str, *, step: int, **values: Any) -> None:
        """Log something that is no step: an evaluation, a checkpoint, a refused step.

        Numbers go to TensorBoard as ``NAME/KEY``, everything to ``log.jsonl``. Values are what JSON can hold.
        Nothing is printed: say it with :meth:`print` in words.
        """
        if not self.active:
            return
        self._write({"event": name, "step": step} | values)
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._scalar(f"{name}/{key}", value, step)

    def print(self, text: str) -> None:
        """A line on rank 0's terminal, above the progress bar."""
        if self.active:
            self._console.print(text)

    def track(self, items: Iterable[T], total: int, name: str) -> Iterator[T]:
        """Pass ``items`` on, with a line on rank 0's terminal after each tenth of ``total``."""
        for number, item in enumerate(items, start=1):
            yield item
            if 10 * number // total > 10 * (number - 1) // total:
                self.print(f"{name}: {number}/{total}")

    def settings(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run as a table in TensorBoard's text page."""
        if self.active:
            rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
            text = f"| setting | value |\n|---|---|\n{rows}"
            self._board.draw(lambda board: board.add_text("settings", text, self.completed_steps))

    def outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """What the run came to, beside its settings, for TensorBoard's HParams page."""
        if self.active and figures:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            metrics = {f"outcome/{name}": value for name, value in figures.items()}
            self._board.draw(
                lambda board: board.add_hparams(plain, metrics, run_name=".", global_step=self.total_steps)
            )

    def importance(self, importance: Mapping[str, Tensor], protection: Mapping[str, Tensor]) -> None:
        """Importance and protection of each kind of unit, as heatmaps and as the histogram of the soft-mask.

        Written to TensorBoard, and the heatmaps to ``importance-KIND.png`` in the run's folder too. A kind
        with too many units a layer for a heatmap has a histogram of its importance instead.

        Args:
            importance: kind -> (layers, units), mean ``|gradient|`` of the gates.
            protection: kind -> (layers, units), the ``a`` of the soft-mask ``1 - a``.
        """
        if not self.active:
            return
        for kind, a in protection.items():
            self._importance(kind, importance[kind], a)

    def _importance(self, kind: str, importance: Tensor, a: Tensor) -> None:
        figure = plots.importance_figure(importance, a, kind) if plots.can_be_drawn(importance) else None
        step = self.completed_steps

        def draw(board: SummaryWriter) -> None:
            if figure is None:
                board.add_histogram(f"importance/{kind}", importance.float(), step)
            else:
                plots.save_png(figure, self.run_dir / f"importance-{kind}.png")
                board.add_image(f"importance/{kind}", plots.pixels(figure), step, dataformats="HWC")
            board.add_histogram(f"soft_mask/{kind}", 1 - a.float(), step)

        self._board.draw(draw)

    def protection(
        self, kind: str, *, step: int, one_minus_a: Tensor, movement: Tensor, **figures: float
    ) -> None:
        """How far each unit of a kind moved since the start, against what its mask asks for.

        Written as the event ``protection`` of that ``kind``, with its figures, which TensorBoard shows as
        ``protection/KIND/NAME``; with the matrices and a picture where a layer has few enough units.

        Args:
            kind: of unit.
            step: finished optimizer steps.
            one_minus_a: (layers, units), the factor of the soft-mask.
            movement: (layers, units), movement of the unit's own rows since the start relative to that of
                unprotected units: near ``one_minus_a`` where the mask does what it says, near 1 everywhere
                where the optimizer undoes it.
            figures: numbers about all of them.
        """
        if not self.active:
            return
        record: dict[str, Any] = {"event": "protection", "step": step, "kind": kind, **figures}
        for name, value in figures.items():
            self._scalar(f"protection/{kind}/{name}", value, step)
        if plots.can_be_drawn(movement):
            record |= {"one_minus_a": _rounded(one_minus_a), "movement": _rounded(movement)}
            pixels = plots.pixels(plots.protection_figure({"": (one_minus_a, movement)}, kind))
            self._board.draw(
                lambda board: board.add_image(f"protection/{kind}", pixels, step, dataformats="HWC")
            )
        self._write(record)

    def close(self) -> None:
        """Take the progress bar off the terminal and finish the files."""
        if self.active:
            self._bar.stop()
            self._flush()
            self._file.close()
            self._board.draw(SummaryWriter.close)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._unwritten += json.dumps(_jsonable(record), allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                self.print(f"{self.run_dir / LOG_FILE} can't be written ({error.strerror}); kept for later")
            self._warned = True

    def _scalar(self, name: str, value: float | list[float], step: int) -> None:
        ranks = value if isinstance(value, list) else [value]
        names = [f"{name}/rank{rank}" for rank in range(len(ranks))] if isinstance(value, list) else [name]

        def draw(board: SummaryWriter) -> None:
            for each, number in zip(names, ranks, strict=True):
                board.add_scalar(each, number, step)

        self._board.draw(draw)


class _Board:
    """TensorBoard's writer; where its files can't be written, it says so once and draws no more."""

    def __init__(self, folder: str, purge_step: int | None, say: Callable[[str], None]) -> None:
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=purge_step, flush_secs=30)
        self._folder, self._say = folder, say

    def draw(self, call: Callable[[SummaryWriter], None]) -> None:
        """Do ``call`` with the writer, if there still is one."""
        if self._writer is None:
            return
        try:
            call(self._writer)
        except OSError as error:
            self._writer = None
            self._say(
                f"{self._folder} can't be written ({error.strerror}): no more curves; log.jsonl has all"
            )


def read_values(values: Mapping[str, Value]) -> dict[str, float | list[float]]:
    """Plain numbers of ``values`` (without ``"step"``), tensors fetched from the device in one transfer."""
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


def step_line(step: int, total_steps: int, numbers: Mapping[str, float | Sequence[float]]) -> str:
    """The one line of a step: step, losses, grad norm, learning rate, tokens/s, data wait, time, memory."""
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


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``. A torn last line, as a killed run leaves it, is left out.

    Raises:
        UserError: another line is no JSON object.
    """
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}:{number} is no JSON object: {line.strip()[:60]!r}. Only the run writes its log; "
                    "restore the file, or start the run in a new folder."
                )
            records.append(record)
    return records


def truncate_log(path: Path, completed_steps: int) -> None:
    """Drop the records after ``completed_steps`` (all where it is 0): the resumed run writes them anew."""
    if not path.exists():
        return
    kept = [r for r in read_log(path) if r.get("step", 0) <= completed_steps] if completed_steps else []
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _jsonable(value: Any) -> Any:
    """``value`` with null for what JSON can't hold: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _jsonable(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix.float().tolist()]
