"""Where the programs of the two MPIs are; a test that needs one is skipped where it is absent."""

import os
import shutil
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent


def open_mpi() -> Path:
    """The folder with Open MPI's programs."""
    if not (PROGRAMS / "ompi_info").exists():
        pytest.skip("needs Open MPI beside python: pip install dga_scale[mpi]")
    return PROGRAMS


def mpich() -> Path:
    """The folder with MPICH's programs, which have the same names."""
    own = PROGRAMS.parent / "mpich"
    found = shutil.which("mpiexec.hydra", path=f"{own / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs MPICH's mpiexec.hydra: pip install --no-deps --target {own} mpich")
    return Path(found).parent
