"""Run a function on several real ranks (gloo, CPU) without paying for a launch each time.

``run_ranks(2, fn, *args)`` calls ``fn(*args)`` on both ranks of a two-process group and returns
``[result of rank 0, result of rank 1]``. The processes of each world size are forked once a test session
(``tests/helpers/forks.py``) and kept; ``fn`` is pickled by reference, so it has to stand at the top level of
an importable module (``tests/<room>/test_x.py`` is one), and arguments and results have to pickle.

An exception on any rank comes back as ``RankError`` with each failing rank's traceback. Warnings are errors,
and an error in a thread or in ``__del__`` (a file left open), which Python would only print, fails the call.
A rank that does not answer in time is reported with the place it hangs in, its pool is killed and the next
test gets a new one. What the ranks print goes to a file, whose end is shown when something fails.
"""

import atexit
import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.strict import collect_lost_errors

if TYPE_CHECKING:
    from tests.helpers.forks import Launch

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE = 5.0
"""Seconds the other ranks get to answer once one has failed; then they are taken to wait for it."""
START_TIMEOUT = 240.0
TAIL = 3000


class RankError(Exception):
    """At least one rank raised or hung; ``errors``: each such rank's exception class name and message."""

    def __init__(self, report: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(report)
        self.errors = errors


class LostError(Exception):
    """Errors in threads or in ``__del__``, which nobody caught."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call ``fn(*args)`` on every rank of a group of ``world_size`` processes; the results in rank order.

    The group is initialised (``torch.distributed`` and DeepSpeed), RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
    and MASTER_PORT are set, torch runs one thread and is seeded with 0 before each call.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = _Pool(world_size)
        atexit.register(close_pools)  # before the end of the template, which came first
    return pool.call(fn, args, timeout)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def without_gloo(text: str) -> str:
    """What ranks have printed, without the lines that gloo prints when they meet, in torch 2.10."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo] "))


def close_pools() -> None:
    """End all worker processes."""
    for world_size in list(_pools):
        _pools.pop(world_size).kill()


class _Pool:
    def __init__(self, world_size: int) -> None:
        from tests.helpers.forks import launch  # it imports this module

        self.world_size = world_size
        with Listener(family="AF_UNIX") as listener:
            self.ranks: Launch = launch(world_size, _serve, str(listener.address))
            connected = [listener.accept() for _ in range(world_size)]
        by_rank = {connection.recv(): connection for connection in connected}
        self.connections = [by_rank[rank] for rank in range(world_size)]
        self._collect("the start of the process group", START_TIMEOUT)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        payload = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send_bytes(payload)
        return self._collect(f"{fn.__module__}.{fn.__qualname__}", timeout)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(self.connections))
        results: list[Any] = [None] * self.world_size
        failures: dict[int, tuple[str, str, str]] = {}
        while pending and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(pending.values()), left)
            for rank in [r for r, connection in pending.items() if connection in ready]:
                try:
                    ok, answer = pickle.loads(pending[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    while rank not in self.ranks.codes:
                        self.ranks.ended(GRACE)
                    code = self.ranks.codes[rank]
                    ok, answer = False, ("ProcessDied", f"exit code {code}", self._tail(rank))
                if ok:
                    results[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
                del pending[rank]
        report = [
            f"rank {r} raised in {what}: {name}: {text}\n{tb}" for r, (name, text, tb) in failures.items()
        ]
        errors = {r: (name, text) for r, (name, text, _) in failures.items()}
        for rank in pending:
            place = self._where(rank)
            if failures:
                report.append(f"rank {rank} was left waiting in {place.splitlines()[0]}")
            else:
                report.append(f"rank {rank} hung in {what} after {timeout:g} s, {place}\n{self._tail(rank)}")
                errors[rank] = ("Hang", place)
        if pending or any(name == "ProcessDied" for name, _ in errors.values()):
            _pools.pop(self.world_size, None)
            self.kill()
        if errors:
            raise RankError("\n".join(report), errors)
        return results

    def _where(self, rank: int) -> str:
        """Ask for the Python stack of a rank that does not answer, innermost call first."""
        before = self._log(rank).stat().st_size
        self.ranks.kill(rank, signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while self._log(rank).stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # until it has written the last line
        with open(self._log(rank), "rb") as log:
            log.seek(before)
            stack = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if "File" in line
            ]
        return "\n  ".join(stack) or "no Python frame"

    def _log(self, rank: int) -> Path:
        return self.ranks.logs[rank]

    def _tail(self, rank: int) -> str:
        text = self._log(rank).read_text(errors="replace")
        return f"--- end of what rank {rank} printed ---\n{text[-TAIL:]}"

    def kill(self) -> None:
        for connection in self.connections:
            connection.close()
        for rank in range(self.world_size):
            self.ranks.kill(rank)
        self.ranks.wait()


_pools: dict[int, _Pool] = {}


def _serve(address: str) -> None:
    """Be a rank: join the group, then answer calls until the pool closes the connection or dies."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    lost = collect_lost_errors()
    parent = os.getppid()
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    connection = Client(address)
    connection.send(int(os.environ["RANK"]))

    def answer(work: Callable[[], Any]) -> None:
        try:
            message = pickle.dumps((True, work()))
        except Exception as error:
            message = pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc())))
        sys.stdout.flush()
        connection.send_bytes(message)

    answer(_join)
    while True:
        try:
            payload = connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)  # no teardown: gloo's waits for peers that may be gone
        answer(lambda payload=payload: _run(payload, lost))


def _join() -> None:
    import torch

    from dga_scale.launch.world import join_cluster
    from dga_scale.logging.quiet import quiet_libraries
    from dga_scale.zero.engine import connect_deepspeed

    quiet_libraries()  # as every program does
    torch.set_num_threads(1)
    join_cluster()
    connect_deepspeed()  # for tests that call DeepSpeed by themselves


def _run(payload: bytes, lost: list[str]) -> Any:
    import torch

    fn, args = pickle.loads(payload)
    lost.clear()  # of a call that failed, whose frames end after its answer
    torch.manual_seed(0)
    linear = torch.nn.functional.linear
    try:
        result = fn(*args)
    finally:
        # A ZeRO-3 engine replaces it for the whole process, by one that rounds otherwise in bf16.
        torch.nn.functional.linear = linear
    if lost:
        raise LostError("\n".join(lost))
    return result


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
