"""Fixtures shared by all rooms."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from dga_scale.config import user_code
from tests.helpers.ranks import REPOSITORY, close_pools
from tests.helpers.small import SmallWorld, make_world
from tests.helpers.strict import python_warnings

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other and for the ranks' pools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: the last of them would keep one worker while the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Find the folder of corpora, end tasks and models beside the repository (``../shared/data``)."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """A tiny model and two corpora for runs of the whole program; read only, copy what you change."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, alone or in the whole suite."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_code_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has imported with ``--import`` is gone for the next: its workers would want it."""
    monkeypatch.setattr(user_code, "_imported", {})


@pytest.fixture(scope="session", autouse=True)
def _rank_pools(pytestconfig: pytest.Config) -> Iterator[None]:
    # Not before: pytest-xdist's workers are not ours.
    filters = [*pytestconfig.getini("filterwarnings"), *(pytestconfig.getoption("pythonwarnings") or [])]
    os.environ["PYTHONWARNINGS"] = python_warnings(filters)
    yield
    close_pools()
