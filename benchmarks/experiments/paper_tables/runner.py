"""Runs pieces one after the other, keeps which are finished, and stops when asked to."""

import fcntl
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import ROOT
from benchmarks.experiments.paper_tables.pieces import Piece
from benchmarks.experiments.paper_tables.settings import label
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from dga_scale.run_folder import write_text


class Ledger:
    """Finished pieces in a file: command and seconds of each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def finished(self, piece: Piece) -> bool:
        """Whether it need not be run.

        Raises:
            UserError: it was run by another command, whose result would be taken for this one's.

        """
        entry = self.entries.get(piece.name)
        if entry is None:
            return False
        if entry["digest"] == _digest(piece):
            return True
        if piece.extends:
            return False
        raise UserError(
            f"{self.file}: {piece.name} was finished by another command: "
            f"{_difference(entry['command'], piece)}. Give another --output_dir; or remove its folder and "
            "its entry in that file."
        )

    def add(self, piece: Piece, seconds: float) -> None:
        """Keep that it is finished."""
        entry = {"kind": piece.kind, "seconds": round(seconds, 1), "digest": _digest(piece)}
        self.entries[piece.name] = {**entry, "command": list(piece.command)}
        write_text(self.file, json.dumps(self.entries, indent=1) + "\n")

    def seconds_left(self, pieces: Sequence[Piece]) -> tuple[float, int]:
        """Sum of what pieces will take, by finished ones of their kind, and how many can't be said."""
        known: dict[str, list[float]] = {}
        for entry in self.entries.values():
            for kind in {entry["kind"], entry["kind"].split()[0]}:
                known.setdefault(kind, []).append(entry["seconds"])
        total, unknown = 0.0, 0
        for piece in pieces:
            found = known.get(piece.kind) or known.get(piece.kind.split()[0])
            total += statistics.mean(found) if found else 0
            unknown += not found
        return total, unknown


class Runner:
    """Runs commands, each in a process group of its own; a signal to us is passed on, and ends the work.

    The command under way holds the folder's lock too: one that outlived us, killed, is not run a second time
    beside itself.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(output / "pieces.json")
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> "Runner":
        self._lock = open(self.output / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.output}: a comparison, or a command that one left behind, is at work there. Wait for "
                "it, or end it."
            ) from None
        self._former = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._lock.close()

    def run(self, piece: Piece, environment: Mapping[str, str]) -> bool:
        """Run a piece; False if it was stopped.

        Raises:
            UserError: it failed; with the end of its log.

        """
        if self._stopped:
            return False
        log = self.output / "logs" / f"{label(piece.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                piece.command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
            if self._stopped:  # while it started
                self._pass_on(signal.SIGTERM)
            code = self._process.wait()
        if self._stopped or code == EXIT_STOPPED:
            return False
        if code != 0:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"{piece.name} ended with code {code}; {log} ends on:\n{last}")
        self.ledger.add(piece, time.monotonic() - started)
        return True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        print("stopping: the running piece saves what it has", flush=True)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def environment() -> dict[str, str]:
    """Ours, with this Python's programs found first and this repository's code used."""
    paths = {"PATH": [str(Path(sys.executable).parent)], "PYTHONPATH": [str(ROOT)]}
    return {
        **os.environ,
        **{
            name: os.pathsep.join([*own, *filter(None, [os.environ.get(name)])])
            for name, own in paths.items()
        },
    }


def _digest(piece: Piece) -> str:
    return hashlib.sha256(json.dumps([piece.command, piece.inputs]).encode()).hexdigest()[:16]


def _difference(former: Sequence[str], piece: Piece) -> str:
    """The first word that differs."""
    for before, now in zip(former, piece.command, strict=False):
        if before != now:
            return f"{before} then, {now} now"
    return f"{len(former)} words then, {len(piece.command)} now"
