"""``log.jsonl``: all that a run logs, one JSON object a line, and its readers.

::

    {"step": 12, "loss/total": 3.51, "loss/mlm": 3.2, "learning_rate": 1e-4, ...}     a step that was logged
    {"event": "checkpoint", "step": 500, "path": "runs/acl/checkpoints/step-000500"}    anything else

``step`` counts finished optimizer steps, from 1; events before the first step have step 0. A value that is
NaN or infinite is ``null`` there: JSON has no other word for it.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dga_scale.errors import UserError
from dga_scale.logging.logger import LoggedRun, Logger, Numbers
from dga_scale.logging.records import check_record
from dga_scale.run_folder import LOG_FILE
from dga_scale.storage.atomic import replace_file
from dga_scale.storage.checked_json import json_problem


class JsonLines(Logger):
    """The logger that writes ``log.jsonl``; every run has one, as reports and resumed runs read it.

    Records after the checkpoint that a run resumes from are cut off, so that the file reads as that of a run
    that was never interrupted.

    Raises:
        UserError: The file of a resumed run holds a line that is no JSON object.

    """

    def __init__(self, run: LoggedRun, say: Callable[[str], None]) -> None:
        super().__init__(run, say)
        self._path = run.folder / LOG_FILE
        truncate_log(self._path, run.completed_steps)
        # Unbuffered: what does not fit on the disk is kept here, and written when it does.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._unwritten, self._warned = b"", False

    def step(self, step: int, numbers: Numbers) -> None:
        self._write({"step": step, **numbers})

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._write({"event": name, "step": step, **values})

    def close(self) -> None:
        self._flush()
        self._file.close()

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
                self.say(f"{self._path} can't be written ({error.strerror}); kept for later")
            self._warned = True


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a ``log.jsonl``. A torn last line, as a killed run leaves it, is left out.

    Raises:
        UserError: It can't be read, or another line is no JSON object of a run's log; it is named.
    """
    records = []
    fix = "Only the run writes its log; restore the file, or start the run in a new folder."
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"it can't be read: {error.strerror}. {fix}", path) from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no JSON object")
            check_record(record)
        except (ValueError, RecursionError) as error:
            what = json_problem(error) if isinstance(error, RecursionError) else str(error)
            shown = line.decode(errors="replace")[:60]
            raise UserError(f"{path}:{number} is no record of a log ({what}): {shown!r}. {fix}") from None
        records.append(record)
    return records


def truncate_log(path: Path, completed_steps: int) -> None:
    """Drop the records after ``completed_steps`` (all where it is 0): the resumed run writes them anew."""
    if not path.exists():
        return
    kept = [r for r in read_log(path) if r["step"] <= completed_steps] if completed_steps else []
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _jsonable(value: Any) -> Any:
    """Return ``value`` with null for what JSON can't hold: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _jsonable(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value
