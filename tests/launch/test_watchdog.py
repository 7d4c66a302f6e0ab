"""The other ranks name a lost rank, and end at once or after the timeout of the heartbeat."""

import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
import torch

from dga_scale.errors import UserError, run_main
from dga_scale.launch.watchdog import EXIT_RANK_LOST, Watchdog, note_step
from dga_scale.launch.world import join_cluster
from tests.helpers.forks import Launch, launch

TIMEOUT = 3.0
PATIENCE = 60.0
"""Seconds for what takes a fraction of one on an idle machine; the message shows it was not the timeout."""
HOST = socket.gethostname()


def ranks(behave: Callable[[int], None]) -> int:
    """Join, start the watchdog, note step 7, then call ``behave`` with this rank."""

    def work() -> int:
        with join_cluster() as cluster, Watchdog(cluster, TIMEOUT):
            note_step(7)
            time.sleep(TIMEOUT / 3)  # heartbeats are sent meanwhile
            behave(cluster.rank)
        return 0

    run_main(work)


def in_a_collective() -> None:
    torch.distributed.all_reduce(torch.zeros(1))


# --- what ranks may do -------------------------------------------------------------------------------------


def rank_1_is_killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    in_a_collective()


def rank_0_is_killed(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    in_a_collective()


def rank_1_stands_still(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    in_a_collective()


def rank_0_stands_still(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    in_a_collective()


def rank_1_fails(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("no such thing")
    in_a_collective()


def rank_1_fails_for_all(rank: int) -> None:
    def work() -> None:
        if rank == 1:
            raise ZeroDivisionError("no such thing")

    join_cluster().run_on_all(work)


def rank_1_finds_a_mistake(rank: int) -> None:
    if rank == 1:
        raise UserError("the folder is wrong")
    in_a_collective()


def all_find_a_mistake(rank: int) -> None:
    time.sleep(rank)
    raise UserError("the folder is wrong")


def all_are_busy_and_leave_one_by_one(rank: int) -> None:
    """Work for longer than the timeout: hashing, products and sleep do not stop the heartbeat."""
    end = time.monotonic() + 1.2 * TIMEOUT + rank
    block, square = bytes(1 << 24), torch.rand(512, 512)
    while time.monotonic() < end:
        hashlib.sha256(block).digest()
        square @ square
    time.sleep(1.2 * TIMEOUT)


def check(launched: Launch, lost: int, survivor_says: str) -> None:
    """Check that the survivor ended with its exit code and one line that names the lost rank."""
    survivor = 1 - lost
    launched.wait()
    assert launched.codes[survivor] == EXIT_RANK_LOST, launched.output(survivor)
    text = launched.output(survivor)
    assert f"error: rank {lost} on {HOST if lost else '127.0.0.1'} {survivor_says}" in text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert "resumes from the newest checkpoint" in text


@pytest.mark.parametrize(("behave", "lost"), [(rank_1_is_killed, 1), (rank_0_is_killed, 0)])
def test_a_killed_rank_ends_the_other_at_once(behave: Callable[[int], None], lost: int) -> None:
    launched = launch(2, ranks, behave)
    check(launched, lost, "is gone: its process ended without a message")
    assert launched.codes[lost] == -signal.SIGKILL
    assert launched.seconds[1 - lost] - launched.seconds[lost] < PATIENCE


@pytest.mark.parametrize(("behave", "lost"), [(rank_1_stands_still, 1), (rank_0_stands_still, 0)])
def test_a_stopped_rank_is_lost_after_the_time_of_silence(behave: Callable[[int], None], lost: int) -> None:
    launched = launch(2, ranks, behave)
    launched.ended(TIMEOUT + PATIENCE)
    assert list(launched.codes) == [1 - lost]
    assert TIMEOUT < launched.seconds[1 - lost] < TIMEOUT + PATIENCE
    launched.kill(lost, signal.SIGCONT)
    check(
        launched, lost, f"has been silent for {TIMEOUT:g} s: node down, or process stopped (last heard of at"
    )
    assert "at step 7)" in launched.output(1 - lost)
    assert launched.codes[lost] == EXIT_RANK_LOST  # it sees that it was given up


@pytest.mark.parametrize("behave", [rank_1_fails, rank_1_fails_for_all])
def test_an_error_of_one_rank_is_what_the_other_says(behave: Callable[[int], None]) -> None:
    launched = launch(2, ranks, behave)
    check(launched, 1, "failed: ZeroDivisionError: no such thing (last heard of at step 7)")
    assert launched.codes[1] == 1
    assert "Traceback" in launched.output(1)


def test_a_mistake_that_only_one_rank_finds_ends_the_other_after_a_while() -> None:
    launched = launch(2, ranks, rank_1_finds_a_mistake)
    check(launched, 1, "ended with: the folder is wrong (last heard of at step 7)")
    assert launched.codes[1] == 2
    assert launched.output(1).endswith("error: the folder is wrong\n")


def test_a_mistake_that_all_find_is_said_once() -> None:
    launched = launch(2, ranks, all_find_a_mistake)
    assert launched.wait() == [2, 2]
    assert [launched.output(rank) for rank in (0, 1)] == ["error: the folder is wrong\n", ""]


def test_work_and_an_end_one_by_one_are_no_loss() -> None:
    launched = launch(2, ranks, all_are_busy_and_leave_one_by_one)
    assert launched.wait() == [0, 0], launched.output(0) + launched.output(1)
    assert launched.output(0) + launched.output(1) == ""


def unknown_clients_connect() -> int:
    cluster = join_cluster()
    with Watchdog(cluster, TIMEOUT) as watchdog:
        if cluster.rank == 0:
            assert watchdog._listener is not None
            for words in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b"{}\n", b'{"lost": "x"}\n', b"x" * 200_000):
                with socket.create_connection(watchdog._listener.getsockname()) as client:
                    client.sendall(words)
        time.sleep(TIMEOUT / 3)
        in_a_collective()
    return 0


def test_unknown_clients_at_the_port_are_ignored() -> None:
    launched = launch(2, unknown_clients_connect)
    assert launched.wait() == [0, 0], launched.output(0)
    assert launched.output(0) + launched.output(1) == ""
