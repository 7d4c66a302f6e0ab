"""Who am I: the rank of this process, whichever launcher started it, and what the ranks say to each other.

Read in this order, the first that applies:

=================  ==================================================================================
launcher           variables
=================  ==================================================================================
deepspeed          RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (all five)
torchrun           the same, and TORCHELASTIC_RUN_ID
mpirun (Open MPI)  OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
mpiexec (Hydra)    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
srun               SLURM_STEP_ID, SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_NODELIST
python             none of these: one process
=================  ==================================================================================
"""

import errno
import importlib
import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dga_scale.errors import UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others. Long enough for rank 0 to convert a large checkpoint meanwhile."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk that is full, read-only or broken says."""


class RankFailed(RuntimeError):
    """Another rank failed; that one knows why."""


_MPI_VARIABLES = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """What the launcher says about this process, before any communication."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None
    """None: not known from the environment; has to be broadcast through MPI."""
    master_port: int


@dataclass(frozen=True)
class Cluster:
    """The ranks of this run, after the process group is up. Built by :func:`join_cluster`."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add ``tensor`` up over all ranks: a new tensor of the same shape on the same device."""
        if self.world_size == 1:
            return tensor.clone()
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order, on every rank. For small plain data."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """Rank 0's ``value`` on every rank; what the other ranks pass is ignored."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def run_on_all(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on every rank and return its value there; one failing rank stops all, none hangs.

        ``fn`` must not communicate. Where a rank raises ``UserError``, or ``OSError`` for a disk that is full
        or can't be written, all ranks raise the same ``UserError``; where it raises something else, that rank
        raises it again and the others ``RankFailed`` naming it.
        """
        value: T | None = None
        error: Exception | None = None
        try:
            value = fn()
        except Exception as caught:
            error = _disk_trouble(caught) or caught
        said = None if error is None else (type(error).__name__, str(error), isinstance(error, UserError))
        failed = {rank: answer for rank, answer in enumerate(self.all_gather_object(said)) if answer}
        if not failed:
            return value  # type: ignore[return-value]  # fn's own value: no error, so it was set
        if error is not None and not isinstance(error, UserError):
            raise error
        rank, (name, text, users) = next(iter(failed.items()))
        if not users:
            raise RankFailed(f"rank {rank} failed: {name}: {text}")
        on_all = self.world_size == len(failed) and len({answer[1] for answer in failed.values()}) == 1
        raise UserError(text if on_all or self.world_size == 1 else f"rank {rank}: {text}")

    def run_on_first(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on rank 0 only and return its value, or raise its ``UserError``, on every rank."""
        value = self.run_on_all(lambda: fn() if self.rank == 0 else None)
        return self.broadcast_object(value)  # type: ignore[return-value]  # rank 0's is fn's own value


def _disk_trouble(error: Exception) -> UserError | None:
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
        return None
    return UserError(
        f"{error.filename or 'a file'} could not be written: {error.strerror}. Free disk space, or mend the "
        "file system, then start the same command again"
    )


def single_process() -> Cluster:
    """Stand alone: for tools that read what a run has written."""
    return Cluster("python", 0, 1, 0, 1, torch.device("cpu"))


def join_cluster() -> Cluster:
    """Start the process group (NCCL on GPUs, gloo on CPUs) among the processes the launcher started.

    Raises ``UserError`` where the launcher's variables are incomplete or contradict each other, or where a
    rank has no GPU.
    """
    place = read_environment(os.environ)
    device = _device(place)
    address, port = _meeting_point(place)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        # DeepSpeed takes it for the number of the GPU.
        LOCAL_RANK=str(place.local_rank if device.index is None else device.index),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    _start_group(device)
    return Cluster(
        place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size, device
    )


def _start_group(device: torch.device) -> None:
    if device.type == "cpu":
        # Otherwise DeepSpeed looks for accelerators and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPUs DeepSpeed compiles a shared-memory all-reduce here: 40 s of g++ on each fresh machine, for an
    # operation that only inference calls. (``deepspeed.comm.torch`` as an attribute is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False
    )


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1:  # srun and some MPI set-ups show each process only its own GPU
        index = 0
    elif place.local_rank < gpus:
        index = place.local_rank
    else:
        raise UserError(
            f"rank {place.rank} is number {place.local_rank} on its node, which has only {gpus} GPUs: "
            "start as many processes a node as it has GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def read_environment(env: Mapping[str, str]) -> Place:
    """Read the place of this process from a launcher's variables, without starting anything.

    Raises ``UserError`` naming the variables that are missing, not numbers, or in contradiction.
    """
    place = _torch_place(env) or _mpi_place(env) or _slurm_place(env)
    if place is None:
        return Place("python", 0, 1, 0, 1, "127.0.0.1", _free_port())
    if not 0 <= place.rank < place.world_size or not 0 <= place.local_rank < place.local_world_size:
        raise UserError(
            f"{place.launcher} gives rank {place.rank} of {place.world_size}, number {place.local_rank} of "
            f"{place.local_world_size} on its node: ranks count from 0 and stay below their number; "
            "unset variables left over from another launch"
        )
    return place


def _torch_place(env: Mapping[str, str]) -> Place | None:
    ours = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env]
    if not ours:
        return None
    missing = [name for name in _TORCH_VARIABLES if name not in env]
    if missing:
        raise UserError(
            f"{', '.join(ours)} set but not {', '.join(missing)}: a distributed run needs all of "
            f"{', '.join(_TORCH_VARIABLES)}; unset them for a single process, or start with deepspeed "
            "or torchrun"
        )
    rank, world_size, local_rank = (_integer(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif "CROSS_RANK" in env:
        launcher = "deepspeed"
    else:
        launcher = "environment"
        _check_against_scheduler(env, rank, world_size)
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    local_world_size = _integer(env, local_size) if local_size else max(local_rank + 1, 1)
    return Place(
        launcher,
        rank,
        world_size,
        local_rank,
        local_world_size,
        env["MASTER_ADDR"],
        _integer(env, "MASTER_PORT"),
    )


def _check_against_scheduler(env: Mapping[str, str], rank: int, world_size: int) -> None:
    """Ranks set by hand or by a wrapper script have to be those that MPI or SLURM started."""
    found = _mpi_place(env) or _slurm_place(env)
    if found is None:
        return
    if world_size > found.world_size:
        raise UserError(
            f"WORLD_SIZE={world_size}, but {found.launcher} started {found.world_size} processes: the run "
            f"would wait for ranks that never come; ask {found.launcher} for {world_size}, or unset RANK and "
            "WORLD_SIZE"
        )
    if (rank, world_size) != (found.rank, found.world_size):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={world_size} contradict {found.launcher}, which started this process as "
            f"{found.rank} of {found.world_size}: unset RANK, WORLD_SIZE and LOCAL_RANK"
        )


def _mpi_place(env: Mapping[str, str]) -> Place | None:
    for launcher, names in _MPI_VARIABLES.items():
        # srun with a PMI plugin sets PMI_RANK too, without Hydra's local numbers.
        if names[0] not in env or (launcher == "mpiexec" and names[2] not in env and "SLURM_STEP_ID" in env):
            continue
        if missing := [name for name in names if name not in env]:
            raise UserError(
                f"{names[0]} is set but not {', '.join(missing)}: this is no complete MPI launch; start with "
                f"{launcher}, or unset {names[0]}"
            )
        rank, world_size, local_rank, local_world_size = (_integer(env, name) for name in names)
        address = env.get("MASTER_ADDR") or ("127.0.0.1" if local_world_size == world_size else None)
        job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_FD") or launcher
        port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else _port_of(job)
        return Place(launcher, rank, world_size, local_rank, local_world_size, address, port)
    return None


def _slurm_place(env: Mapping[str, str]) -> Place | None:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too; only a step (srun) has all its tasks running.
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    names = ("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if missing := [name for name in names if name not in env]:
        raise UserError(
            f"SLURM_PROCID is set but not {', '.join(missing)}: this is no complete SLURM step; start with "
            "srun inside the allocation, or unset the SLURM variables"
        )
    tasks_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, world_size, local_rank = (_integer(env, n) for n in ("SLURM_PROCID", tasks_name, "SLURM_LOCALID"))
    address = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
    job = f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}"
    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else _port_of(job)
    return Place("srun", rank, world_size, local_rank, _slurm_local_size(env, local_rank), address, port)


def _slurm_local_size(env: Mapping[str, str], local_rank: int) -> int:
    """Tasks on this node, from the form ``2(x3),1`` that SLURM gives for all nodes."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")).split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else local_rank + 1


def first_host(hostlist: str) -> str:
    """Take the first host of a SLURM host list: ``node[003-010,12],other`` -> ``node003``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hostlist)
    if found is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={hostlist!r} is no SLURM host list; set MASTER_ADDR to the first node"
        )
    return found[1] + (found[2] or "") + found[3]


def _meeting_point(place: Place) -> tuple[str, int]:
    if place.master_addr is not None:
        return place.master_addr, place.master_port
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"{place.launcher} started processes on several nodes and the address of rank 0 is not known: "
            "install dga_scale[mpi], or set MASTER_ADDR to rank 0's host for all processes"
        ) from error
    address = MPI.COMM_WORLD.bcast(socket.gethostname(), root=0)
    return address, place.master_port


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(
            f"{name}={env[name]!r} is no whole number: the launcher's variables are damaged"
        ) from None


def _port_of(job: str) -> int:
    """Choose a port that all processes of a job agree on, and that two jobs rarely share."""
    return 20000 + zlib.crc32(job.encode()) % 20000


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
