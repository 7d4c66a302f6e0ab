"""The cores of a machine, shared by its ranks."""

import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dga_scale.launch.cpu_threads import RankCores, cpu_limit, share, share_cores


def shares(*ranks: RankCores) -> list[int]:
    return [share(rank, list(ranks)) for rank in ranks]


def test_ranks_that_may_use_all_cores_divide_them() -> None:
    everything = frozenset(range(16))
    assert shares(*[("a", everything, None)] * 4) == [4] * 4
    assert shares(*[("a", everything, None)] * 5) == [3] * 5
    assert shares(*[("a", frozenset({0, 1}), None)] * 3) == [1] * 3
    assert shares(("a", everything, None), ("b", everything, None)) == [16, 16]


def test_ranks_that_are_bound_keep_their_cores() -> None:
    halves = [("a", frozenset(range(8)), None), ("a", frozenset(range(8, 16)), None)]
    assert shares(*halves) == [8, 8]
    assert shares(halves[0], halves[0], halves[1]) == [4, 4, 8]


def test_a_containers_limit_is_shared_too() -> None:
    assert shares(*[("a", frozenset(range(64)), Fraction(6))] * 2) == [3, 3]
    assert shares(("a", frozenset({0, 1}), Fraction(6))) == [2]
    assert shares(*[("a", frozenset(range(4)), Fraction(1, 2))] * 2) == [1, 1]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, Fraction(3, 2)),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, Fraction(4)),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_limits_of_both_versions_of_cgroups(
    tmp_path: Path, files: dict[str, str], limit: Fraction | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == limit


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_number_that_somebody_has_set_stays(threads: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one_of(ranks: int) -> int:
        share_cores(lambda own: [own] * ranks)
        return torch.get_num_threads()

    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert as_one_of(1000) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert as_one_of(1000) == 1
    torch.set_num_threads(1)
    assert as_one_of(1) == 1
    torch.set_num_threads(1000)
    assert 1 <= as_one_of(1) <= len(os.sched_getaffinity(0))
