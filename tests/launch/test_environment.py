"""Which rank am I, under every launcher: variables as the launchers were seen to set them."""

import subprocess
import sys

import pytest

from dga_scale.errors import UserError
from dga_scale.launch.environment import LaunchInfo, first_host, read_launch_info
from tests.helpers.mpi import mpich
from tests.helpers.ranks import REPOSITORY

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job-77@1",
}
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}
DEEPSPEED = TORCH | {"CROSS_RANK": "1", "CROSS_SIZE": "2"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
# As a step of two nodes with two tasks each was seen to set them.
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (TORCH, LaunchInfo("environment", 3, 4, 1, 2, "node1", 29501)),
        (TORCHRUN, LaunchInfo("torchrun", 3, 4, 1, 2, "node1", 29501)),
        (DEEPSPEED, LaunchInfo("deepspeed", 3, 4, 1, 2, "node1", 29501)),
        # torchrun as the one task that srun or mpirun starts on each node: torchrun's ranks count.
        (TORCHRUN | SRUN | {"SLURM_NTASKS": "2"}, LaunchInfo("torchrun", 3, 4, 1, 2, "node1", 29501)),
        (TORCHRUN | OPEN_MPI, LaunchInfo("torchrun", 3, 4, 1, 2, "node1", 29501)),
        # deepspeed --hostfile and torchrun from the shell that srun --pty gave.
        (
            DEEPSPEED | SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
            LaunchInfo("deepspeed", 3, 4, 1, 2, "node1", 29501),
        ),
        (OPEN_MPI | {"MASTER_PORT": "1234"}, LaunchInfo("mpirun", 1, 2, 1, 2, "127.0.0.1", 1234)),
        (
            OPEN_MPI
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_PORT": "1"},
            LaunchInfo("mpirun", 1, 2, 0, 1, None, 1),
        ),
        # mpirun within an allocation, which starts its processes through srun: MPI's ranks count.
        (OPEN_MPI | SRUN | {"MASTER_PORT": "1234"}, LaunchInfo("mpirun", 1, 2, 1, 2, "127.0.0.1", 1234)),
        (HYDRA | {"MASTER_PORT": "1234"}, LaunchInfo("mpiexec", 2, 3, 2, 3, "127.0.0.1", 1234)),
        (HYDRA | SRUN | {"MASTER_PORT": "1234"}, LaunchInfo("mpiexec", 2, 3, 2, 3, "127.0.0.1", 1234)),
        (
            HYDRA | {"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"},
            LaunchInfo("mpiexec", 2, 3, 0, 1, None, 29500),
        ),
        # deepspeed --launcher mpich adds the five to Hydra's; --launcher openmpi and slurm nothing.
        (
            HYDRA | TORCH | {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"},
            LaunchInfo("mpiexec", 2, 3, 2, 3, "node1", 29501),
        ),
        (SRUN | {"MASTER_PORT": "1234"}, LaunchInfo("srun", 3, 4, 1, 2, "gpu07", 1234)),
        (SRUN | {"PMI_RANK": "3", "MASTER_PORT": "1234"}, LaunchInfo("srun", 3, 4, 1, 2, "gpu07", 1234)),
    ],
)
def test_launch_info_under_each_launcher(env: dict[str, str], expected: LaunchInfo) -> None:
    assert read_launch_info(env) == expected


def test_the_shell_of_salloc_is_one_process() -> None:
    assert read_launch_info(SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}).launcher == "python"


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    info = read_launch_info(batch)
    assert (info.launcher, info.rank, info.world_size) == ("python", 0, 1)


def test_ports_agree_within_a_job_and_differ_between_jobs() -> None:
    ports = {
        (job, rank): read_launch_info(SRUN | {"SLURM_JOB_ID": job, "SLURM_PROCID": rank}).master_port
        for job in ("77", "78")
        for rank in ("2", "3")
    }
    assert ports["77", "2"] == ports["77", "3"] != ports["78", "2"] == ports["78", "3"]
    assert all(20000 <= port < 32768 for port in ports.values())


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[003-010,12],x", "n003"),
        ("n[1,4].cluster", "n1.cluster"),
        ("n-1-[7-9]", "n-1-7"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, r"RANK set but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCH | {"RANK": "four"}, r"RANK='four' is no whole number"),
        (TORCH | {"RANK": "4"}, r"rank 4 of 4"),
        (TORCH | {"LOCAL_RANK": "2"}, r"number 2 of 2 on its node"),
        (TORCH | OPEN_MPI, r"WORLD_SIZE=4, but mpirun started 2 processes.*ranks that never come"),
        (TORCH | SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, r"WORLD_SIZE=4, but srun started 2"),
        (TORCHRUN | SRUN, r"srun started torchrun 4 times, each for a run of its own on 2 nodes: .*--nnodes"),
        (
            DEEPSPEED | OPEN_MPI | {"CROSS_SIZE": "1"},
            r"mpirun started deepspeed 2 times, each for a run of its own on 1 node: start it once",
        ),
        (HYDRA | {"PMI_RANK": "x"}, r"PMI_RANK='x' is no whole number"),
        (TORCH | SRUN | {"SLURM_PROCID": "2"}, r"RANK=3 WORLD_SIZE=4 contradict srun.* 2 of 4"),
        ({k: v for k, v in OPEN_MPI.items() if "LOCAL" not in k}, r"OMPI_COMM_WORLD_RANK is set but not"),
        ({k: v for k, v in HYDRA.items() if k != "PMI_SIZE"}, r"PMI_RANK is set but not PMI_SIZE"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"}, r"SLURM_PROCID is set but not SLURM_NTASKS"),
    ],
)
def test_incomplete_or_contradictory_variables(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_launch_info(env)


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "torchrun"),
        (DEEPSPEED | {"CROSS_SIZE": "1"}, "deepspeed"),
        (OPEN_MPI, "mpirun"),
        (HYDRA, "mpiexec"),
        (SRUN, "srun"),
        ({}, "python"),
    ],
)
def test_one_rank_under_each_launcher(env: dict[str, str], launcher: str) -> None:
    ranks = {name for name in env if "RANK" in name and "NRANK" not in name} | {
        "SLURM_PROCID",
        "SLURM_LOCALID",
    }
    sizes = {name for name in env if name.endswith(("_SIZE", "_LOCALNRANKS", "_NTASKS"))}
    one = env | dict.fromkeys(ranks & env.keys(), "0") | dict.fromkeys(sizes - {"CROSS_SIZE"}, "1")
    if launcher == "srun":
        one |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}
    info = read_launch_info(one)
    assert (info.launcher, info.rank, info.world_size, info.local_rank) == (launcher, 0, 1, 0)
    assert info.local_world_size == 1


@pytest.mark.mpi
def test_ranks_of_mpiexec_choose_one_port() -> None:
    """Behind a wrapper script too. Hydra sets nothing that they have in common."""
    look = (
        "import os; from dga_scale.launch.environment import read_launch_info; "
        "print(read_launch_info(os.environ).master_port)"
    )
    wrapper = f"{sys.executable} -c '{look}'; true"
    done = subprocess.run(
        [mpich() / "mpiexec.hydra", "-n", "2", "bash", "-c", wrapper],
        capture_output=True, text=True, timeout=280, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    first, second = done.stdout.split()
    assert first == second
