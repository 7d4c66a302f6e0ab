"""Launch real ranks again and again without paying for the imports each time: for tests that kill them.

``launch(2, fn, *args)`` starts two processes that call ``fn(*args)`` as ranks 0 and 1, each with a launcher's
variables in its environment. They are forked from a template that has torch, DeepSpeed and dga_scale imported
and has started no thread; the process group is theirs to start. ``fn`` stands at the top level of an
importable module, and what it returns (or passes to ``sys.exit``) is the exit code. Warnings are errors; an
error in a thread or in ``__del__``, which Python would only print, makes an exit code of 0 one of 1.
"""

import atexit
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY, TAIL, free_port, without_gloo
from tests.helpers.strict import collect_lost_errors

START_TIMEOUT = 240.0
_IMPORTED = (
    "dga_scale.train.sequence",
    "deepspeed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "transformers.models.bert.modeling_bert",
    "torch._inductor.compile_fx",  # DeepSpeed's engine imports it: seconds
)
_template: "_Template | None" = None


@dataclass
class Launch:
    """Ranks on their way. ``seconds``: when each ended, after the launch; filled by ``wait``."""

    pids: list[int]
    logs: list[Path]
    started: float
    seconds: dict[int, float]
    codes: dict[int, int]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, if it is still there."""
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def ended(self, timeout: float = 0.0) -> bool:
        """Wait until a rank has ended, at most ``timeout`` seconds; whether all have."""
        waiting = {os.pidfd_open(pid): rank for rank, pid in enumerate(self.pids) if rank not in self.codes}
        try:
            ready, _, _ = select.select(list(waiting), [], [], timeout) if waiting else ([], [], [])
        finally:
            for descriptor in waiting:
                os.close(descriptor)
        for descriptor in ready:
            rank = waiting[descriptor]
            self.seconds[rank] = time.monotonic() - self.started
            self.codes[rank] = _the_template().ask(("reap", self.pids[rank]))
        return len(self.codes) == len(self.pids)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Exit codes by rank (a signal's number, negative, where one ended it).

        Raises:
            TimeoutError: ranks that are still there, which are killed; with the end of what all printed.
        """
        deadline = time.monotonic() + timeout
        while not self.ended(max(deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= deadline:
                hung = [rank for rank in range(len(self.pids)) if rank not in self.codes]
                for rank in hung:
                    os.kill(self.pids[rank], signal.SIGABRT)  # faulthandler writes the stacks into the log
                    _the_template().ask(("reap", self.pids[rank]))
                said = [self.output(rank) for rank in range(len(self.pids))]
                text = "\n".join(each.partition("Extension modules:")[0][-TAIL:] for each in said)
                raise TimeoutError(f"ranks {hung} are still there after {timeout:g} s\n{text}")
        return [self.codes[rank] for rank in range(len(self.pids))]

    def output(self, rank: int) -> str:
        """What a rank has printed, errors included."""
        return without_gloo(self.logs[rank].read_text(errors="replace"))


def launch(world_size: int, fn: Callable[..., int | None], *args: Any) -> Launch:
    """Start ``fn(*args)`` on ``world_size`` new processes."""
    template = _the_template()
    logs = [template.next_log() for _ in range(world_size)]
    started = time.monotonic()
    pids = template.ask(("launch", world_size, fn, args, free_port(), logs))
    return Launch(pids, logs, started, {}, {})


def _the_template() -> "_Template":
    global _template
    if _template is None:
        _template = _Template()
        atexit.register(_template.close)
    return _template


class _Template:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._count = 0
        self._connection, theirs = Pipe()
        drop = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow 21 starts a thread with its import
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forks", str(theirs.fileno())],
            cwd=REPOSITORY,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        assert self._connection.poll(START_TIMEOUT), "the template did not start"
        self._connection.recv()

    def ask(self, request: tuple[Any, ...]) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def next_log(self) -> Path:
        self._count += 1
        log = Path(self._folder.name) / f"{self._count}.log"
        log.touch()
        return log

    def close(self) -> None:
        self._connection.close()
        self._process.wait()
        self._folder.cleanup()


def _serve(connection: Connection) -> None:
    _import_all()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request[0] == "launch":
            pids = [_fork(connection, rank, *request[1:]) for rank in range(request[1])]
            for pid in pids:
                os.setpgid(pid, pids[0])  # one may kill all
            connection.send(pids)
        else:
            _, status = os.waitpid(request[1], 0)
            connection.send(os.waitstatus_to_exitcode(status))


def _import_all() -> None:
    from dga_scale.logging.quiet import quiet_libraries

    quiet_libraries()
    for name in _IMPORTED:
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from dga_scale.logging.throughput import device_peak

    torch.set_num_threads(1)
    # What each would work out anew, for half a second: found once a process.
    device_peak(torch.device("cpu"), torch.float32)
    get_checkpoint_conversion_mapping("bert")


def _fork(
    connection: Connection,
    rank: int,
    world_size: int,
    fn: Callable[..., int | None],
    args: tuple[Any, ...],
    port: int,
    logs: list[Path],
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code, lost = 1, collect_lost_errors()
    try:
        connection.close()
        log = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import faulthandler

        faulthandler.enable()
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({k: str(v) for k, v in values.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = fn(*args) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        if lost:
            print("\n".join(lost), file=sys.stderr)
            code = code or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
