"""The real program under every launcher, on one host and on two: the losses of a plain group, bit for bit."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import HOSTS, Hosts, what_is_missing
from tests.helpers.mpi import PROGRAMS, mpich, open_mpi
from tests.helpers.ranks import REPOSITORY, free_port, run_ranks
from tests.helpers.small import SmallWorld, make_world
from tests.helpers.strict import LOST
from tests.test_train import losses, run_training

pytestmark = pytest.mark.slow

SCRIPTS = REPOSITORY / "launchers" / "mpi"
TIMEOUT = 280.0
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """By number of ranks, the losses of a group that no launcher started."""
    found = {}
    for ranks in (1, 2):
        run = tmp_path_factory.mktemp("runs") / str(ranks)
        assert run_ranks(ranks, run_training, flags(world, run), timeout=TIMEOUT) == [0] * ranks
        found[ranks] = losses(run)
        assert len(found[ranks]) == 2
    return found


def program(world: SmallWorld, run: Path) -> list[str]:
    """The program and its arguments, as they stand behind any launcher."""
    return ["launchers/dga_train.py", *flags(world, run)]


def flags(world: SmallWorld, run: Path) -> list[str]:
    values = {
        "ds_config": REPOSITORY / "ds_configs" / "zero2.json",
        "model": world.model,
        "corpus": world.corpus,
        "output_dir": run,
        "method": "mlm",
        "max_steps": 2,
        "global_batch_size": 16,
        "learning_rate": 1e-3,
        "max_eval_samples": 16,
        "bf16": "false",
    }
    return [f"--{name}={value}" for name, value in values.items()]


def launch(program: list[str], command: list[str], scratch: Path, **variables: object) -> str:
    """Run ``program`` with ``command`` before it; what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "OMPI_"))}
    compiled = scratch / "compiled"
    settings = {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "TORCH_EXTENSIONS_DIR": compiled,
        **variables,
    }
    done = subprocess.run(
        [*command, *program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=REPOSITORY,
        env=clean | SETTINGS | {name: str(value) for name, value in settings.items()},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not compiled.exists(), "DeepSpeed compiled an extension"
    assert LOST not in done.stderr, done.stderr
    return done.stdout


def hostfile(folder: Path, line: str) -> Path:
    path = folder / "hosts"
    path.write_text(f"# one machine\n{line}\n")
    return path


def test_deepspeed(world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path) -> None:
    port = free_port()
    command = ["deepspeed", "--num_accelerators=2", f"--master_port={port}"]
    said = launch(program(world, tmp_path / "run"), command, tmp_path)
    assert f"2 ranks on 1 node, started by deepspeed, rank 0 at 127.0.0.1:{port}" in said
    assert losses(tmp_path / "run") == expected[2]


def test_torchrun(world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path) -> None:
    command = ["torchrun", "--standalone", "--nproc_per_node=2"]
    said = launch(program(world, tmp_path / "run"), command, tmp_path)
    assert "2 ranks on 1 node, started by torchrun" in said
    assert losses(tmp_path / "run") == expected[2]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_mpirun(world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path, ranks: int) -> None:
    open_mpi()
    hosts = hostfile(tmp_path, f"localhost slots={ranks}")
    command = ["bash", str(SCRIPTS / "openmpi.sh")]
    said = launch(program(world, tmp_path / "run"), command, tmp_path, HOSTFILE=hosts)
    where = (
        "1 rank on 1 node, started by mpirun\n",
        "2 ranks on 1 node, started by mpirun, rank 0 at localhost:",
    )
    assert where[ranks - 1] in said
    assert losses(tmp_path / "run") == expected[ranks]


@pytest.mark.mpi
def test_mpiexec(world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / "mpich.sh")]
    mpiexec, hosts = mpich() / "mpiexec.hydra", hostfile(tmp_path, "localhost:2")
    said = launch(program(world, tmp_path / "run"), command, tmp_path, MPIEXEC=mpiexec, HOSTFILE=hosts)
    assert "2 ranks on 1 node, started by mpiexec, rank 0 at localhost:" in said
    assert losses(tmp_path / "run") == expected[2]


JOIN = """
import sys
from datetime import timedelta
from dga_scale.launch.world import join_cluster
from dga_scale.errors import run_main
def main():
    with join_cluster(timedelta(seconds=float(sys.argv[1]))) as cluster:
        line = cluster.describe()
        if cluster.rank == 0:
            print(line, flush=True)
run_main(main)
"""


def joining(folder: Path, seconds: float = TIMEOUT) -> list[str]:
    """A program that only joins."""
    (folder / "join.py").write_text(JOIN)
    return [str(folder / "join.py"), str(seconds)]


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_deepspeed_through_mpi(tmp_path: Path, name: str) -> None:
    """DeepSpeed wants several hosts for these; ``--force_multi`` takes one."""
    folder = open_mpi() if name == "openmpi" else mpich()
    hosts = hostfile(tmp_path, "localhost slots=2")
    command = ["deepspeed", f"--launcher={name}", f"--hostfile={hosts}", "--force_multi", "--no_ssh_check",
               "--master_addr=127.0.0.1", f"--master_port={free_port()}"]  # fmt: skip
    path = f"{folder}:{PROGRAMS}:{os.environ['PATH']}"
    said = launch(joining(tmp_path), command, tmp_path, PATH=path)
    started_by = {"openmpi": "mpirun", "mpich": "mpiexec"}[name]
    assert f"2 ranks on 1 node, started by {started_by}, rank 0 at 127.0.0.1:" in said


def test_plain_python(world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path) -> None:
    said = launch(program(world, tmp_path / "run"), [sys.executable], tmp_path)
    assert "1 rank on 1 node, started by python\n" in said
    assert losses(tmp_path / "run") == expected[1]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if missing := what_is_missing():
        pytest.skip(f"two hosts on one machine need {missing}")
    environment = {
        **SETTINGS,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": os.environ["PYTHONWARNINGS"],
        "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin",
    }
    with Hosts(tmp_path_factory.mktemp("hosts"), environment) as hosts:
        yield hosts


@pytest.mark.hosts
def test_deepspeed_on_two_hosts(
    hosts: Hosts, world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    """Over pdsh and ssh; the address of rank 0 is what ``ssh alpha hostname -I`` says."""
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    command = ["deepspeed", f"--hostfile={tmp_path / 'hosts'}", *program(world, tmp_path / "run")]
    # It would export the variable without quotes; each login has its own.
    command = ["env", "--unset=PYTHONWARNINGS", *command]
    said = hosts.run("alpha", command, cwd=REPOSITORY, timeout=TIMEOUT)
    assert f"2 ranks on 2 nodes, started by deepspeed, rank 0 at {HOSTS['alpha']}:29500" in said
    assert losses(tmp_path / "run") == expected[2]


@pytest.mark.hosts
def test_mpirun_on_two_hosts(
    hosts: Hosts, world: SmallWorld, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    """Nothing in the environment says where rank 0 is: it says so itself, through MPI."""
    launcher = [open_mpi() / "mpirun", "--host", "beta:1,alpha:1", "-n", "2", sys.executable]
    said = hosts.run("alpha", [*launcher, *program(world, tmp_path / "run")], cwd=REPOSITORY, timeout=TIMEOUT)
    assert "2 ranks on 2 nodes, started by mpirun, rank 0 at beta:" in said
    assert losses(tmp_path / "run") == expected[2]


@pytest.mark.hosts
def test_mpiexec_on_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("beta:1\nalpha:1\n")
    variables = {
        "MPIEXEC": mpich() / "mpiexec.hydra",
        "HOSTFILE": tmp_path / "hosts",
        "PYTHON": sys.executable,
    }
    launcher = ["env", *(f"{name}={v}" for name, v in variables.items()), "bash", SCRIPTS / "mpich.sh"]
    said = hosts.run("alpha", [*launcher, *joining(tmp_path)], cwd=REPOSITORY, timeout=TIMEOUT)
    assert "2 ranks on 2 nodes, started by mpiexec, rank 0 at beta:" in said


@pytest.mark.hosts
def test_hosts_that_can_not_be_connected_say_so(hosts: Hosts, tmp_path: Path) -> None:
    """Each rank finds the other, but listens at an address that the other can't reach."""
    variables = "RANK=%n WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=alpha MASTER_PORT=29600 GLOO_SOCKET_IFNAME=lo"
    join = " ".join([sys.executable, *joining(tmp_path, seconds=20)])
    command = f"cd {REPOSITORY} && {variables} {join} 2>&1 || true"
    said = hosts.run("alpha", ["pdsh", "-R", "ssh", "-w", "alpha,beta", command], tmp_path, timeout=200)
    assert "on alpha found the other ranks, but could not connect to all of them" in said
    assert "on beta found the other ranks" in said
    assert "GLOO_SOCKET_IFNAME" in said


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
