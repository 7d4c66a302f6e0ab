"""Executors say who does which work: worker processes, MPI ranks, or the tasks of a job array.

Work is a list of items, each of which leaves a file when it is done. Items do not depend on who does them,
and doing one twice gives the same file, so the executors below differ in nothing but who takes which item and
how they wait for each other.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dga_scale.errors import EXIT_USER_ERROR, UserError
from dga_scale.storage.atomic import storage_errors

_THREADS = 2
"""Workers in one process. Tokenizers let go of Python's lock, and threads need no start, no second tokenizer
and no shard of their own; reading, finding duplicates and packing are Python, and want processes."""


@dataclass(frozen=True)
class Stage:
    """A stage of the work: its items may be done in any order, all of them before the next stage."""

    name: str
    calls: Sequence[Callable[[], None]]
    """The functions that do an item each; they can be sent to another process."""
    markers: Sequence[Path]
    """The file of each item that exists once the item is done."""
    finished: Path
    """The file that is there once all work is done, when the markers are removed."""

    def missing(self) -> list[int]:
        """Return the items that are not done yet."""
        missing = [number for number, marker in enumerate(self.markers) if not marker.exists()]
        return [] if missing and self.finished.exists() else missing


class Executor(AbstractContextManager["Executor"]):
    """A single process, with worker processes from four workers on: does every item."""

    index = 0
    size = 1

    def __init__(self, num_workers: int, output: Path, show_progress: bool = True) -> None:
        # The tokenizers' own threads stay off: `num_workers` says how many cores are used.
        os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
        self._num_workers = num_workers
        self._processes = max(1, num_workers // _THREADS)
        self._output = output
        self._pool: ProcessPoolExecutor | None = None
        self._show_progress = show_progress
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (show_progress and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Executor":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def threads(self, items: int) -> int:
        """Return the number of threads for each of ``items`` items that use several."""
        return self._num_workers // min(self._processes, items)

    def on_first(self, action: Callable[[], Any]) -> None:
        """Run ``action`` once for the executor; when it returns, its files are there for all."""
        action()

    def run(self, stage: Stage) -> None:
        """Run the stage, and return when every item is done, by this process or another."""
        self._do(stage, stage.missing())

    def _do(self, stage: Stage, items: Sequence[int]) -> None:
        if not items:
            return
        if self._show_progress and not sys.stderr.isatty():
            print(f"{stage.name}: {len(items)} of {len(stage.markers)} to do", file=sys.stderr, flush=True)
        bar = self._bar.add_task(stage.name, total=len(items))
        for _ in self._completed([stage.calls[number] for number in items]):
            self._bar.advance(bar)

    def _completed(self, calls: Sequence[Callable[[], None]]) -> Iterator[None]:
        """Yields after each item, in any order; an error ends it, items under way are finished."""
        if self._processes == 1 or len(calls) == 1:
            for call in calls:
                _run(call, self._output)
                yield
            return
        if self._pool is None:
            # Spawned, not forked: MPI and the tokenizers' threads do not survive a fork.
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
            )
        futures = [self._pool.submit(_run, call, self._output) for call in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, probably for want of memory. What is finished is kept: run the "
                "same command again to continue, with fewer --num_workers"
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _run(call: Callable[[], None], output: Path) -> None:
    with storage_errors(output):
        call()


def _start_worker() -> None:
    """A worker leaves interrupts to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this worker process when the one that started it is gone, killed for example."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class MpiExecutor(Executor):
    """The ranks of one ``mpirun``: item i is done by rank i modulo the number of ranks."""

    def __init__(self, num_workers: int, output: Path) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(
                "started by mpirun, but mpi4py is missing: pip install 'dga_scale[mpi]', or use "
                "--array_task i/N"
            ) from error
        self._comm = MPI.COMM_WORLD
        self.index, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if self.size != _started_by_mpi():
            raise UserError(
                f"mpirun started {_started_by_mpi()} processes, but mpi4py counts {self.size}: it was built "
                "with another MPI than that mpirun's. Use the mpirun beside this python, set MPI4PY_MPIABI "
                "and LD_LIBRARY_PATH to the other MPI, or use --array_task i/N"
            )
        super().__init__(num_workers, output, show_progress=self.index == 0)

    def on_first(self, action: Callable[[], Any]) -> None:
        """Run ``action`` on rank 0; its error ends every rank."""
        self._together(action if self.index == 0 else lambda: None)

    def run(self, stage: Stage) -> None:
        """Run each rank's share of the stage; an error on one rank ends all."""
        # One list for all: a rank that looked later would see other ranks' items done, and shift the shares.
        missing = self._comm.bcast(stage.missing() if self.index == 0 else None)
        self._together(lambda: self._do(stage, missing[self.index :: self.size]))

    def _together(self, action: Callable[[], Any]) -> None:
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        failed = [rank for rank, failed in enumerate(self._comm.allgather(failure is not None)) if failed]
        if failure is not None and (self.index == failed[0] or not isinstance(failure, UserError)):
            raise failure
        if failed:
            # One rank tells what went wrong; the others leave with the same exit code.
            raise SystemExit(EXIT_USER_ERROR)


class ArrayTaskExecutor(Executor):
    """One task of a job array: tasks see each other's work in the output folder only.

    A task does its share, then waits for the others. Where nothing has moved for ``patience`` seconds (the
    others were killed, or have not been started) it does what is missing itself, so that the corpus is
    completed by whichever task comes last, and a task that is late finds its share done.
    """

    def __init__(
        self, num_workers: int, output: Path, index: int, size: int, patience: float, scratch: Path
    ) -> None:
        super().__init__(num_workers, output)
        self.index, self.size = index, size
        self._patience = patience
        self._scratch = scratch

    def run(self, stage: Stage) -> None:
        """Run this task's share, wait for the others, and run the items that no task works on."""
        self._do(stage, [number for number in stage.missing() if number % self.size == self.index])
        last_change = time.monotonic()
        state = None
        if missing := stage.missing():
            print(
                f"{stage.name}: waiting for the other array tasks, {len(missing)} to do",
                file=sys.stderr,
                flush=True,
            )
        while missing := stage.missing():
            current = (len(missing), _sizes(self._scratch))
            if current != state:
                state, last_change = current, time.monotonic()
            if time.monotonic() - last_change > self._patience:
                # Each waiting task begins elsewhere, and looks again after each round.
                first = self.index * len(missing) // self.size
                self._do(stage, (missing[first:] + missing[:first])[: self._processes])
            else:
                time.sleep(min(1.0, self._patience / 10))


def _sizes(folder: Path) -> set[tuple[str, int]]:
    """Return the unfinished files and their sizes, which change as long as any task works."""
    sizes = set()
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # finished since it was listed
            sizes.add((path.name, path.stat().st_size))
    return sizes


def under_mpi() -> bool:
    """Whether an MPI launcher started this process."""
    return _started_by_mpi() > 0


def _started_by_mpi() -> int:
    """Return how many processes an MPI launcher started; 0 where there is no MPI launcher."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 0)
