"""The ranks of a run, whichever launcher started them, and the communication between them."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dga_scale.errors import EXIT_USER_ERROR, UserError
from dga_scale.launch.cpu_malloc import keep_freed_memory
from dga_scale.launch.cpu_threads import share_cores
from dga_scale.launch.environment import LaunchInfo, read_launch_info
from dga_scale.launch.rendezvous import JOIN_TIMEOUT, rendezvous
from dga_scale.streams import write_stderr

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long a rank waits in a collective: long enough for rank 0 to convert a large checkpoint meanwhile."""

_REPORT_SECONDS = 5.0
"""How long a rank that ends on a mistake waits to hear whether rank 0 has the same: less than the watchdog's
grace, which then ends those that have none."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""The error numbers of a disk that is full, read-only or broken."""

_PATH_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ESTALE)
"""The error numbers of a path that was taken away, or that can't be one."""


class RankFailed(RuntimeError):
    """Another rank failed, and raises the reason there."""


@dataclass(frozen=True)
class Cluster:
    """The ranks of this run, after the process group is up. Built by :func:`join_cluster`."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """The key-value store through which the ranks met; None: there was a process group before."""

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Destroy the process group where all ranks leave together: without an error, or on a ``UserError``.

        NCCL prints warnings otherwise. Gloo's threads live on: see :func:`~dga_scale.errors.end_rank`.
        A mistake that all ranks share is printed once, by rank 0.
        """
        if isinstance(error, UserError) and self.store is not None and self.world_size > 1:
            self._report(error, self.store)
        if dist.is_initialized() and (error is None or isinstance(error, UserError)):
            dist.destroy_process_group()

    def _report(self, error: UserError, store: dist.Store) -> None:
        """Print a mistake unless rank 0 has printed the same.

        No rank leaves before rank 0 has printed it: a launcher ends all ranks when the first one leaves.
        """
        patience = timedelta(seconds=_REPORT_SECONDS)
        if self.rank == 0:
            error.report()
        with contextlib.suppress(dist.DistError):  # rank 0, or another one, is not here
            if self.rank == 0:
                store.set("mistake", str(error))
            else:
                store.wait(["mistake"], patience)
                error.reported = store.get("mistake").decode() == str(error)
            if store.add("heard", 1) == self.world_size:
                store.set("all heard", "")
            if self.rank == 0:
                store.wait(["all heard"], patience)
        error.report()

    def describe(self) -> str:
        """Describe the ranks, their launcher and rank 0's address in one line; every rank has to call it."""
        # A launcher counts nodes as it likes: each has one rank that is its first.
        nodes = self.all_gather_object(self.local_rank).count(0)
        where = f"{_plural(self.world_size, 'rank')} on {_plural(nodes, 'node')}, started by {self.launcher}"
        if self.world_size == 1:
            return where
        return f"{where}, rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``tensor`` over all ranks, a new tensor of the same shape on the same device."""
        if self.world_size == 1:
            return tensor.clone()
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """Return the ``value`` of every rank, in rank order, on every rank; for small plain data."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's ``value`` on every rank; what the other ranks pass is ignored."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def run_on_all(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on every rank and return its value there; where one fails, all raise and none hangs.

        ``fn`` must not communicate.

        Raises:
            UserError: On every rank, where one raised it, or an ``OSError`` of a full or broken disk, or of
            a path that is gone or can't be one.
            RankFailed: Where another rank raised any other error; that rank raises its own error again.
        """
        value: T | None = None
        error: Exception | None = None
        try:
            value = fn()
        except Exception as caught:
            error = _as_disk_error(caught) or caught
        failure = None
        if error is not None:
            users = isinstance(error, UserError)
            problem, path = (
                (error.problem, error.path) if isinstance(error, UserError) else (str(error), None)
            )
            failure = (type(error).__name__, problem, path, users, socket.gethostname())
        failed = {rank: found for rank, found in enumerate(self.all_gather_object(failure)) if found}
        if not failed:
            return value  # type: ignore[return-value]  # fn's own value: no error, so it was set
        if error is not None and not isinstance(error, UserError):
            raise error
        rank, (name, text, path, users, host) = next(iter(failed.items()))
        if not users:
            raise RankFailed(f"rank {rank} on {host} failed: {name}: {text}")
        on_all = self.world_size == len(failed) and len({found[1:3] for found in failed.values()}) == 1
        raise UserError(text if on_all or self.world_size == 1 else f"rank {rank} on {host}: {text}", path)

    def run_on_first(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on rank 0 only, and return its value or raise its ``UserError`` on every rank."""
        value = self.run_on_all(lambda: fn() if self.rank == 0 else None)
        return self.broadcast_object(value)  # type: ignore[return-value]  # rank 0's is fn's own value


def _as_disk_error(error: Exception) -> UserError | None:
    if not isinstance(error, OSError):
        return None
    if error.errno in _PATH_ERRORS and error.filename is not None:
        return UserError(
            f"{error.strerror}. Give another path; or was it, or a folder above it, removed or renamed while "
            "the program ran?",
            error.filename,
        )
    if error.errno not in _DISK_ERRORS:
        return None
    return UserError(
        f"{error.filename or 'a file'} could not be written: {error.strerror}. Free disk space, or repair "
        "the file system, then start the same command again"
    )


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def single_process() -> Cluster:
    """Return a cluster of this process alone, for tools that read what a run has written."""
    return Cluster("python", 0, 1, 0, 1, torch.device("cpu"))


def join_cluster(timeout: timedelta = JOIN_TIMEOUT) -> Cluster:
    """Start the process group (NCCL on GPUs, gloo on CPUs) among the processes the launcher started.

    Raises:
        UserError: The launcher's variables are incomplete or contradict each other, or a rank has no GPU,
            does not join within ``timeout``, or can't be connected to.
    """
    info = read_launch_info(os.environ)
    device = _device(info)
    address, port = _rendezvous_address(info)
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        # DeepSpeed uses LOCAL_RANK as the number of the GPU.
        LOCAL_RANK=str(info.local_rank if device.index is None else device.index),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    store = None
    if not dist.is_initialized():
        store = rendezvous(info, address, port, _gpu_id(device), timeout)
        _start_group(info, device, store, timeout)
    cluster = Cluster(
        info.launcher, info.rank, info.world_size, info.local_rank, info.local_world_size, device, store
    )
    share_cores(cluster.all_gather_object)
    if device.type == "cpu":
        keep_freed_memory()
    return cluster


def _start_group(info: LaunchInfo, device: torch.device, store: dist.Store, timeout: timedelta) -> None:
    if device.type == "cpu":
        # Otherwise DeepSpeed searches for accelerators and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # The group waits for its connections as long as for a collective.
    timer = threading.Timer(timeout.total_seconds(), _give_up, [info, timeout])
    timer.daemon = True
    timer.start()
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            # With one rank there is no other device that NCCL could connect to.
            device_id=device if device.type == "cuda" and info.world_size > 1 else None,
        )
        if info.world_size > 1:
            dist.barrier()  # NCCL connects at the first collective
    except RuntimeError as error:
        raise UserError(f"{_connection_failure(info)} ({' '.join(str(error).split())})") from error
    finally:
        timer.cancel()


def _connection_failure(info: LaunchInfo) -> str:
    return (
        f"rank {info.rank} on {socket.gethostname()} found the other ranks, but could not connect to all of "
        "them: is there a firewall between the nodes, or have they several networks? "
        "NCCL_SOCKET_IFNAME (GPUs) and GLOO_SOCKET_IFNAME (CPUs) name the interface to use"
    )


def _give_up(info: LaunchInfo, timeout: timedelta) -> None:
    # The main thread hangs in a call that nothing ends.
    write_stderr(f"error: {_connection_failure(info)} (waited for {timeout.total_seconds():g} s)")
    os._exit(EXIT_USER_ERROR)


def _device(info: LaunchInfo) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1:  # srun and some MPI installations show each process only its own GPU
        index = 0
    elif info.local_rank < gpus:
        index = info.local_rank
    else:
        raise UserError(
            f"rank {info.rank} is number {info.local_rank} on its node, which has only {gpus} GPUs: "
            "start as many processes a node as it has GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _gpu_id(device: torch.device) -> str | None:
    """Return an id that no other GPU has; None on CPUs."""
    if device.type == "cpu":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _rendezvous_address(info: LaunchInfo) -> tuple[str, int]:
    if info.master_addr is not None:
        return info.master_addr, info.master_port
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"{info.launcher} started processes on several nodes and the address of rank 0 is not known: "
            "install dga_scale[mpi], or set MASTER_ADDR to rank 0's host for all processes"
        ) from error
    ranks = MPI.COMM_WORLD.Get_size()
    if ranks != info.world_size:
        raise UserError(
            f"{info.launcher} started {info.world_size} processes, but mpi4py counts {ranks}: it was built "
            f"with another MPI ({MPI.Get_library_version().split(',')[0].strip()}). Set MASTER_ADDR to rank "
            "0's host for all processes, or MPI4PY_MPIABI and LD_LIBRARY_PATH to the MPI of the launcher"
        )
    host, port = MPI.COMM_WORLD.bcast((socket.gethostname(), _free_port()), root=0)
    MPI.Finalize()  # nothing else goes through MPI
    return host, port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
