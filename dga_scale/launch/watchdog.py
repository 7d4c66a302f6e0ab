"""A rank that is gone or stands still ends the others, which say which one it was.

Without it they would wait in their next collective for ``COLLECTIVE_TIMEOUT``, or end on the transport's
"connection closed by peer".

Every rank holds one connection to rank 0. Both ends send a line every few seconds from a thread of their own:
long steps, saves and compilations do not delay it. A connection that closes without a goodbye means that the
process has ended, and is noticed at once. One that is silent for ``heartbeat_timeout`` seconds means that the
node is down, the network is cut, or the process is stopped (SIGSTOP). Rank 0 tells the others what it found,
and they take its own silence for its end. The thread then prints one line and leaves the process, whose main
thread may be stuck in a collective.
"""

import contextlib
import json
import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dga_scale.errors import UserError, without_secrets
from dga_scale.launch.world import Cluster, RankFailed

EXIT_RANK_LOST = 76
"""Exit code of a rank that ended because another one was lost; running the same command goes on."""

BEATS = 6
"""Beats in the time after which silence counts as an end."""

GRACE = 10.0
"""Seconds a rank gets to end by itself after another one has ended on a user's mistake, which all share."""

_CONNECT_SECONDS = 60.0
_LONGEST_LINE = 1 << 16
_last_step = 0


def note_step(step: int) -> None:
    """Remember the last finished step: when all ranks were last heard of."""
    global _last_step
    _last_step = step


@dataclass
class _Peer:
    """The other end of a connection."""

    socket: socket.socket
    rank: int | None = None
    """None: it has not said who it is yet."""
    host: str = ""
    silent: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)

    def send(self, message: dict[str, Any], last: bool = False) -> None:
        # Lines are far smaller than a socket's buffer: one that does not take them is as good as gone.
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")
            if last:
                self.socket.shutdown(socket.SHUT_WR)


class Watchdog:
    """Watches the ranks of a run while it is entered; with one rank there is nothing to watch.

    Args:
        cluster: the ranks.
        timeout: seconds of silence (``--heartbeat_timeout``); 0: no watchdog.

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
        """Connect all ranks; where one can't be, say so and go on without."""
        if not self._on:
            return self
        note_step(0)
        cluster = self._cluster
        self._selector = selectors.DefaultSelector()
        self._stop, stopped = socket.socketpair()
        self._selector.register(stopped, selectors.EVENT_READ, "stop")
        place = ("", 0, "")
        if cluster.rank == 0:
            place = self._listen()
            self._start()
        address, port, self._token = cluster.broadcast_object(place)
        problem = self._connect(address, port) if cluster.rank > 0 else ""
        problems = [p for p in cluster.all_gather_object(problem) if p]
        if problems:
            self._leave_off()
            if cluster.rank == 0:
                print(f"no watchdog over the ranks: {problems[0]}", flush=True)
        elif cluster.rank > 0:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say how this rank ends; where a collective failed, wait to hear which rank is the reason."""
        if not self._on or self._thread is None:
            return
        if error is not None and _is_about_another_rank(error):
            self._thread.join(self._timeout + GRACE)  # ends the process when the reason is known
        if error is None:
            last = {"end": "bye"}
        elif isinstance(error, UserError):
            last = {"end": "mistake", "reason": f"ended with: {error}"}
        else:
            last = {"end": "failure", "reason": f"failed: {type(error).__name__}: {error}"}
        self._leave_off()
        for peer in self._peers:
            peer.send(last)
            peer.socket.close()

    def _listen(self) -> tuple[str, int, str]:
        """Open rank 0's port: its address for the others, and a word that they have to say."""
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
        """Connect to rank 0; what is in the way, if something is."""
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

    def _leave_off(self) -> None:
        """End the thread; the connections stay."""
        self._stop.send(b".")
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._listener is not None:
            self._listener.close()

    def _watch(self) -> None:
        before = last_beat = time.monotonic()
        while True:
            for key, _ in self._selector.select(self._interval / 2):
                if key.data == "stop":
                    return
                if key.data == "new":
                    assert self._listener is not None
                    with contextlib.suppress(OSError):  # who knocked has gone
                        self._add(self._listener.accept()[0])
                else:
                    self._read(key.data)
            now = time.monotonic()
            # Time in which this process stood still itself (a job that was suspended) does not count.
            awake, before = min(now - before, self._interval), now
            self._wait_for_the_end(awake)
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
            if not self._heard(peer, line):
                self._drop(peer)
                return
        if not received:
            self._lost(peer, "is gone: its process ended without a word (killed, or out of memory)")
        elif len(peer.buffer) > _LONGEST_LINE:
            self._drop(peer)

    def _heard(self, peer: _Peer, line: bytearray) -> bool:
        """Take one line in; False: the connection has served its purpose."""
        if peer.rank is None:
            token, _, line = line.partition(b" ")
            if not secrets.compare_digest(token, self._token.encode()):
                return False  # a stranger
        message = json.loads(line)
        if peer.rank is None:
            peer.rank, peer.host = message["rank"], message["host"]
        if "lost" in message:
            self._leave(message["lost"])
        match message.get("end"):
            case "mistake":
                # It may be everybody's: then this rank ends on it too, and says it better.
                self._ending = self._ending or (
                    self._said(peer, message["reason"]),
                    min(GRACE, self._timeout),
                )
            case "failure":
                self._lost(peer, message["reason"])
        return "end" not in message

    def _wait_for_the_end(self, awake: float) -> None:
        if self._ending is not None:
            text, left = self._ending
            self._ending = (text, left - awake)
            if left <= 0:
                self._tell(text)

    def _said(self, peer: _Peer, what: str) -> str:
        # A step that this rank has finished was the other one's too: they reduce its losses together.
        return f"rank {peer.rank} on {peer.host} {what} (last heard of at step {_last_step})"

    def _lost(self, peer: _Peer, what: str) -> None:
        if peer.rank is None:
            self._drop(peer)
        else:
            self._tell(self._said(peer, what))

    def _tell(self, text: str) -> None:
        """Tell the others, who are told by rank 0 only, and leave."""
        if self._cluster.rank == 0:
            for peer in self._peers:
                peer.send({"lost": text}, last=True)
            time.sleep(0.2)  # closing with lines unread would take back what was just sent
        self._leave(text)

    def _leave(self, text: str) -> None:
        cluster = self._cluster
        # A line for each node; of rank 0's end its neighbour speaks.
        if cluster.local_rank == 0 or (cluster.rank == 1 and text.startswith("rank 0 ")):
            advice = "The other ranks end too; the same command goes on from the newest checkpoint."
            os.write(sys.stderr.fileno(), f"error: {without_secrets(text)}. {advice}\n".encode())
        os._exit(EXIT_RANK_LOST)


def _allow_open_files(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _is_about_another_rank(error: BaseException) -> bool:
    """Whether an error only says that a collective failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RankFailed | dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and ("gloo" in str(seen) or "NCCL" in str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
