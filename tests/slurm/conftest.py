"""One SLURM for all tests of a session that want one."""

from collections.abc import Iterator

import pytest

from tests.helpers.slurm_cluster import SlurmCluster, missing_daemons


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes, ready."""
    if missing := missing_daemons():
        pytest.skip(
            f"needs {', '.join(missing)}: apt-get install slurm-wlm munge (.ci/install-cluster-tools)"
        )
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
