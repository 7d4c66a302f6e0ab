"""DeepSpeed's own way to SLURM: ``deepspeed --launcher slurm`` calls srun."""

from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import NODES, SlurmCluster
from tests.test_launchers import joining, launch

pytestmark = pytest.mark.slurm


def test_deepspeed_through_srun(slurm: SlurmCluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node} slots=1\n" for node in NODES))
    command = ["deepspeed", "--launcher=slurm", f"--hostfile={hosts}", f"--num_nodes={len(NODES)}",
               "--no_ssh_check", "--master_addr=localhost"]  # fmt: skip
    # What SLURM calls node1 is this machine: asking it by ssh, as DeepSpeed would, finds nobody.
    # DeepSpeed passes PYTHONWARNINGS on by srun --export, which is parted at commas.
    variables = {"MASTER_ADDR": "localhost", "SLURM_CONF": slurm.config, "PYTHONWARNINGS": "default"}
    said = launch(joining(tmp_path), command, tmp_path, **variables)
    assert "2 ranks on 2 nodes, started by srun, rank 0 at localhost:" in said
