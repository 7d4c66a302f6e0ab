"""Find out which rank of how many this process is, from the launcher's environment variables alone.

The launchers are tried in this order, and the first that applies counts:

=================  ==================================================================================
launcher           variables
=================  ==================================================================================
torchrun           RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and TORCHELASTIC_RUN_ID
deepspeed          the same five and CROSS_RANK; on one node, and over ssh or pdsh (``--hostfile``)
environment        the same five: set by hand or by a wrapper script
mpirun (Open MPI)  OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
mpiexec (Hydra)    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS: MPICH, Intel MPI, MVAPICH
srun               SLURM_STEP_ID, SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_NODELIST
python             none of these: one process
=================  ==================================================================================

``deepspeed --launcher openmpi`` and ``--launcher slurm`` start the program with ``mpirun`` and ``srun`` and
set nothing themselves; ``--launcher mpich`` adds the five to Hydra's, which have to agree.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil

from dga_scale.errors import UserError

DEFAULT_PORT = 29500
"""The default port of torch's own launchers."""

_FIRST_SPECIAL_STEP = 0xFFFFFFFA
"""The first of SLURM's special step numbers (interactive, batch, extern), which are not srun's steps."""

_MPI_VARIABLES = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher says about this process, before any communication."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None
    """The address of rank 0's host; None: the environment has none, and rank 0 broadcasts one through MPI."""
    master_port: int


def read_launch_info(env: Mapping[str, str]) -> LaunchInfo:
    """Read rank and world size of this process from a launcher's variables, without starting anything.

    Raises:
        UserError: Variables are missing, are not numbers, or contradict each other; each is named.
    """
    info = _torch_info(env) or _scheduler_info(env)
    if info is None:
        return LaunchInfo("python", 0, 1, 0, 1, "127.0.0.1", DEFAULT_PORT)
    if not 0 <= info.rank < info.world_size or not 0 <= info.local_rank < info.local_world_size:
        raise UserError(
            f"{info.launcher} gives rank {info.rank} of {info.world_size}, number {info.local_rank} of "
            f"{info.local_world_size} on its node: ranks count from 0 and stay below their number; "
            "unset variables left over from another launch"
        )
    return info


def _torch_info(env: Mapping[str, str]) -> LaunchInfo | None:
    present = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env]
    if not present:
        return None
    missing = [name for name in _TORCH_VARIABLES if name not in env]
    if missing:
        raise UserError(
            f"{', '.join(present)} set but not {', '.join(missing)}: a distributed run needs all of "
            f"{', '.join(_TORCH_VARIABLES)}; unset them for a single process, or start with deepspeed "
            "or torchrun"
        )
    rank, world_size, local_rank = (_integer(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    info = LaunchInfo(
        "environment",
        rank,
        world_size,
        local_rank,
        _integer(env, local_size) if local_size else max(local_rank + 1, 1),
        env["MASTER_ADDR"],
        _integer(env, "MASTER_PORT"),
    )
    scheduler = _scheduler_info(env)
    if "TORCHELASTIC_RUN_ID" in env:
        info, nodes = replace(info, launcher="torchrun"), "GROUP_WORLD_SIZE"
    elif "CROSS_RANK" in env:
        info, nodes = replace(info, launcher="deepspeed"), "CROSS_SIZE"
    elif scheduler is not None:
        _check_same_ranks(info, scheduler)
        return replace(info, launcher=scheduler.launcher, local_world_size=scheduler.local_world_size)
    else:
        return info
    if scheduler is not None and nodes in env:
        _check_one_run(info.launcher, _integer(env, nodes), scheduler)
    return info


def _check_same_ranks(info: LaunchInfo, scheduler: LaunchInfo) -> None:
    """Check that ranks set by hand or by a wrapper script are those that MPI or SLURM started."""
    if info.world_size > scheduler.world_size:
        raise UserError(
            f"WORLD_SIZE={info.world_size}, but {scheduler.launcher} started {scheduler.world_size} "
            "processes: the run would wait for ranks that never come; ask "
            f"{scheduler.launcher} for {info.world_size}, or unset RANK and WORLD_SIZE"
        )
    if (info.rank, info.world_size) != (scheduler.rank, scheduler.world_size):
        raise UserError(
            f"RANK={info.rank} WORLD_SIZE={info.world_size} contradict {scheduler.launcher}, which started "
            f"this process as {scheduler.rank} of {scheduler.world_size}: unset RANK, WORLD_SIZE and "
            "LOCAL_RANK"
        )


def _check_one_run(launcher: str, nodes: int, scheduler: LaunchInfo) -> None:
    """Check that a launcher that MPI or SLURM started on each node counts all nodes as one run's."""
    if scheduler.world_size in (1, nodes):
        return
    fix = "give it --nnodes and one --rdzv_endpoint" if launcher == "torchrun" else "start it once, alone"
    raise UserError(
        f"{scheduler.launcher} started {launcher} {scheduler.world_size} times, each for a run of its own on "
        f"{nodes} node{'s' if nodes > 1 else ''}: {fix}, or start python instead of {launcher} with "
        f"{scheduler.launcher}"
    )


def _scheduler_info(env: Mapping[str, str]) -> LaunchInfo | None:
    # mpirun within an allocation starts its processes through srun on other nodes: MPI's ranks count there.
    return _mpi_info(env) or _slurm_info(env)


def _mpi_info(env: Mapping[str, str]) -> LaunchInfo | None:
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
        one_node = local_world_size == world_size
        address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else None)
        if "MASTER_PORT" in env:
            port = _integer(env, "MASTER_PORT")
        elif job := env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid"):
            port = _port_of(job)
        else:  # Hydra says nothing that all ranks have in common
            port = _port_of(_ancestor_without(names[0])) if one_node else DEFAULT_PORT
        return LaunchInfo(launcher, rank, world_size, local_rank, local_world_size, address, port)
    return None


def _slurm_info(env: Mapping[str, str]) -> LaunchInfo | None:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too, and so has the shell that salloc gives, as a
    # step of its own; only a step of srun has all its tasks running.
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    if _integer(env, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
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
    return LaunchInfo("srun", rank, world_size, local_rank, _slurm_local_size(env, local_rank), address, port)


def _slurm_local_size(env: Mapping[str, str], local_rank: int) -> int:
    """Return the number of tasks on this node; SLURM gives all nodes' numbers in the form ``2(x3),1``."""
    counts: list[int] = []
    for item in env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")).split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item):
            counts += [int(found[1])] * int(found[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else local_rank + 1


def first_host(hostlist: str) -> str:
    """Return the first host of a SLURM host list: ``node[003-010,12],other`` -> ``node003``.

    Raises:
        UserError: The text is not a SLURM host list.
    """
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hostlist)
    if found is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={hostlist!r} is no SLURM host list; set MASTER_ADDR to the first node"
        )
    return found[1] + (found[2] or "") + found[3]


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(
            f"{name}={env[name]!r} is no whole number: the launcher's variables are damaged"
        ) from None


def _port_of(job: str) -> int:
    """Choose a port that all processes of a job agree on, and that two jobs rarely share.

    It lies below the ports that Linux gives to outgoing connections (32768 and up).
    """
    return 20000 + zlib.crc32(job.encode()) % 12000


def _ancestor_without(variable: str) -> str:
    """Return the id of the nearest ancestor without the variable, which all ranks of a node share."""
    return next((str(p.pid) for p in psutil.Process().parents() if not has_variable(p, variable)), "")


def has_variable(process: psutil.Process, variable: str) -> bool:
    """Return whether a process was started with the variable in its environment, as far as we may see."""
    try:
        return variable in process.environ()
    except psutil.Error:  # another user's: none of the launcher's processes
        return False
