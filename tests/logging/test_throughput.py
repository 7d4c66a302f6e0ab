"""Rates against arithmetic by hand, peaks against data sheets."""

import psutil
import pytest
import torch

from dga_scale.logging import throughput
from dga_scale.logging.throughput import device_peak, measured_flops, memory_gib, rates

CPU = torch.device("cpu")


def test_rates_by_hand() -> None:
    # 8,000 tokens in 2 s; 3e12 FLOPs in 2 s are 1.5e12/s, a quarter of 6e12.
    found = rates(tokens=8000, seconds=2.0, flops=3e12, peak_flops=6e12)
    assert found == {"tokens_per_second": 4000.0, "step_seconds": 2.0, "mfu": 0.25}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peak_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda"), torch.bfloat16).flops == teraflops * 1e12


def test_unknown_device_and_float32_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A4000")  # no A40
    monkeypatch.setattr(throughput, "measured_flops", lambda device, dtype: 7.0)
    assert device_peak(torch.device("cuda"), torch.bfloat16) == throughput.Peak(
        7.0, "measured with a bfloat16 product"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert device_peak(torch.device("cuda"), torch.float32).source == "measured with a float32 product"


def test_measured_peak_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of three products of 64 x 64, which a clock of our own times at 4, 2 and 3 ms."""
    clock = iter([0.0, 0.010, 0.014, 0.020, 0.022, 0.030, 0.033])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert measured_flops(CPU, torch.float32, size=64, seconds=0.03) == pytest.approx(2 * 64**3 / 0.002)


def test_memory_is_what_the_process_holds() -> None:
    before = memory_gib(CPU)
    held = torch.ones(64 * 2**20)  # 256 MiB, every page written
    assert memory_gib(CPU) - before == pytest.approx(0.25, abs=0.03)
    assert memory_gib(CPU) < psutil.virtual_memory().total / 2**30
    del held
