"""End all ranks when one of them is lost or hangs, with a message that says which one.

Without the watchdog the others would wait in their next collective for ``COLLECTIVE_TIMEOUT``, or end on the
transport's "connection closed by peer".

Every rank holds one connection to rank 0. Both ends send a heartbeat every few seconds from a thread of their
own, so that long steps, saves and compilations do not delay it. A connection that closes without a farewell
means that the process has ended, which is noticed at once. One that is silent for ``heartbeat_timeout``
seconds means that the node is down, the network is cut, or the process is stopped (SIGSTOP). Rank 0 sends the
others what it found, and they take rank 0's own silence for its end. The thread then prints one line and ends
the process, whose main thread may be stuck in a collective.
"""

import contextlib
import json
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dga_scale.errors import UserError, one_line
from dga_scale.launch.world import Cluster, RankFailed
from dga_scale.streams import write_stderr

EXIT_RANK_LOST = 76
"""Exit code of a rank that ended because another one was lost; the same command resumes the run."""

BEATS = 6
"""The number of heartbeats in the time after which silence counts as a loss."""

GRACE = 10.0
"""Seconds a rank gets to end by itself after another one ended on a user's mistake, which all may share."""

_CONNECT_SECONDS = 60.0
_LONGEST_LINE = 1 << 16
_last_step = 0


def note_step(step: int) -> None:
    """Remember the last finished step, at which all ranks were known to be alive."""
    global _last_step
    _last_step = step


@dataclass
class _Peer:
    """The other end of a connection."""

    socket: socket.socket
    rank: int | None = None
    """The rank at the other end; None: it has not identified itself yet."""
    host: str = ""
    silent: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)

    def send(self, message: dict[str, Any], last: bool = False) -> None:
        # Lines are far smaller than a socket's buffer: a peer whose buffer is full is as good as lost.
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")
            if last:
                self.socket.shutdown(socket.SHUT_WR)


class Watchdog:
    """Watches the ranks of a run inside a ``with`` block; with one rank it does nothing.

    Args:
        cluster: The ranks to watch.
        timeout: The seconds of silence after which a rank counts as lost (``--heartbeat_timeout``); 0 turns
            the watchdog off.
    """

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._cluster, self._timeout = cluster, timeout
        self._interval = timeout / BEATS
        self._on = cluster.world_size > 1 and timeout > 0
        self._peers: list[_Peer] = []
        self._listener: socket.socket | None = None
        self._token = ""
        self._ending: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        """Connect all ranks; where one can't connect, print why and run without the watchdog."""
        if not self._on:
            return self
        note_step(0)
        cluster = self._cluster
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ, "stop")
        endpoint = ("", 0, "")
        if cluster.rank == 0:
            endpoint = self._listen()
            self._start()
        address, port, self._token = cluster.broadcast_object(endpoint)
        problem = self._connect(address, port) if cluster.rank > 0 else ""
        problems = [p for p in cluster.all_gather_object(problem) if p]
        if problems:
            self._stop_watching()
            for peer in self._peers:
                peer.socket.close()
            if cluster.rank == 0:
                print(f"the watchdog is off: {problems[0]}", flush=True)
        elif cluster.rank > 0:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send how this rank ends; after a failed collective wait to learn which rank is the reason."""
        if not self._on or self._thread is None:
            return
        if error is not None and _is_about_another_rank(error):
            self._thread.join(self._timeout + GRACE)  # the thread ends the process when the reason is known
        if error is None:
            last = {"end": "bye"}
        elif isinstance(error, UserError):
            last = {"end": "mistake", "reason": f"ended with: {error}"}
        else:
            last = {"end": "failure", "reason": f"failed: {type(error).__name__}: {error}"}
        self._stop_watching()
        for peer in self._peers:
            peer.send(last)
            peer.socket.close()

    def _listen(self) -> tuple[str, int, str]:
        """Open rank 0's port; return its address, its number and the token that other ranks have to send."""
        alone = self._cluster.local_world_size == self._cluster.world_size
        address = "127.0.0.1" if alone else os.environ["MASTER_ADDR"]
        both = not alone and socket.has_dualstack_ipv6()
        _allow_open_files(self._cluster.world_size)
        self._listener = socket.create_server(
            (address if alone else "", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=self._cluster.world_size,
            dualstack_ipv6=both,
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, "new")
        self._token = secrets.token_hex(16)
        return address, self._listener.getsockname()[1], self._token

    def _connect(self, address: str, port: int) -> str:
        """Connect to rank 0, and return why that failed; empty where it worked."""
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            return f"rank {self._cluster.rank} can't reach rank 0 at {address} port {port} ({error})"
        hello = json.dumps({"rank": self._cluster.rank, "host": socket.gethostname()})
        connection.sendall(f"{self._token} {hello}\n".encode())
        peer = self._add(connection)
        peer.rank, peer.host = 0, address
        return ""

    def _add(self, connection: socket.socket) -> _Peer:
        connection.setblocking(False)
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        peer.socket.close()
        self._peers.remove(peer)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _stop_watching(self) -> None:
        """End the thread and close what it waited for, but the connections."""
        self._stop.send(b".")
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for end in (self._stop, self._stopped, self._selector, self._listener):
            if end is not None:
                end.close()

    def _watch(self) -> None:
        before = last_beat = time.monotonic()
        while True:
            for key, _ in self._selector.select(self._interval / 2):
                if key.data == "stop":
                    return
                if key.data == "new":
                    assert self._listener is not None
                    with contextlib.suppress(OSError):  # the client has closed already
                        self._add(self._listener.accept()[0])
                else:
                    self._read(key.data)
            now = time.monotonic()
            # Time in which this process itself was stopped (a suspended job) does not count.
            awake, before = min(now - before, self._interval), now
            self._count_down(awake)
            for peer in list(self._peers):
                peer.silent += awake
                if peer.silent > self._timeout:
                    self._lost(
                        peer, f"has been silent for {self._timeout:g} s: node down, or process stopped"
                    )
            if now - last_beat >= self._interval:
                last_beat = now
                for peer in self._peers:
                    peer.send({})

    def _read(self, peer: _Peer) -> None:
        if peer not in self._peers:
            return
        try:
            received = peer.socket.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            received = b""  # reset: the process has ended
        peer.silent = 0.0
        peer.buffer += received
        while b"\n" in peer.buffer:
            line, _, peer.buffer = peer.buffer.partition(b"\n")
            if not self._receive(peer, line):
                self._drop(peer)
                return
        if not received:
            self._lost(peer, "is gone: its process ended without a message (killed, or out of memory)")
        elif len(peer.buffer) > _LONGEST_LINE:
            self._drop(peer)

    def _receive(self, peer: _Peer, line: bytearray) -> bool:
        """Process one line; False: the connection is no longer needed."""
        if peer.rank is None:
            token, _, line = line.partition(b" ")
            if not secrets.compare_digest(token, self._token.encode()):
                return False  # not a rank of this run
        message = json.loads(line)
        if peer.rank is None:
            peer.rank, peer.host = message["rank"], message["host"]
        if "lost" in message:
            self._exit(message["lost"])
        match message.get("end"):
            case "mistake":
                # All ranks may share the mistake: then this rank ends on it too, with the better message.
                self._ending = self._ending or (
                    self._describe(peer, message["reason"]),
                    min(GRACE, self._timeout),
                )
            case "failure":
                self._lost(peer, message["reason"])
        return "end" not in message

    def _count_down(self, awake: float) -> None:
        if self._ending is not None:
            text, left = self._ending
            self._ending = (text, left - awake)
            if left <= 0:
                self._announce(text)

    def _describe(self, peer: _Peer, what: str) -> str:
        # A step that this rank has finished was the other one's too: they reduce its losses together.
        return f"rank {peer.rank} on {peer.host} {what} (last heard of at step {_last_step})"

    def _lost(self, peer: _Peer, what: str) -> None:
        if peer.rank is None:
            self._drop(peer)
        else:
            self._announce(self._describe(peer, what))

    def _announce(self, text: str) -> None:
        """Send the message to the other ranks, which only rank 0 can, and end this process."""
        if self._cluster.rank == 0:
            for peer in self._peers:
                peer.send({"lost": text}, last=True)
            time.sleep(0.2)  # closing with lines unread would take back what was just sent
        self._exit(text)

    def _exit(self, text: str) -> None:
        cluster = self._cluster
        # One line is printed on each node; rank 1 prints it where rank 0 was lost.
        if cluster.local_rank == 0 or (cluster.rank == 1 and text.startswith("rank 0 ")):
            advice = "The other ranks end too; the same command resumes from the newest checkpoint."
            write_stderr(f"error: {one_line(text)}. {advice}")
        os._exit(EXIT_RANK_LOST)


def _allow_open_files(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + 1024
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _is_about_another_rank(error: BaseException) -> bool:
    """Return whether an error only says that a collective failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RankFailed | dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and ("gloo" in str(seen) or "NCCL" in str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
