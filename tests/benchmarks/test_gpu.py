"""The benchmark of one GPU: its smoke form on a CPU; kernels over time, by hand."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.repeat import compared
from benchmarks.gpu.tables import _repeats, report
from benchmarks.gpu.trace import Kernel, summary
from tests.helpers.ranks import run_ranks


def _measured(folder: Path) -> dict[str, Any]:
    """On a rank: what the benchmark's own process does."""
    from benchmarks.gpu.benchmark import plan
    from benchmarks.gpu.measure import Bench
    from benchmarks.gpu.world import SMOKE, make_world
    from dga_scale.launch.world import join_cluster

    world = make_world(folder, SMOKE, ["tiny"])
    return Bench(plan(world, "tiny", [], until=time.time() + 600), join_cluster()).measure()


def test_smoke_form_measures_all_there_is(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _measured, tmp_path, timeout=300)
    assert found["failed"] == {}
    assert found["sweeps"]["mlm"][0]["micro_batch"] == 4
    assert list(found["runs"]) == [
        "mlm",
        "dga update",
        "dga gradient",
        "dga update, ZeRO-0",
    ]
    for name, run in found["runs"].items():
        assert run["refused_steps"] == 0
        assert run["views"] == (1 if name == "mlm" else 4)
        assert ("importance_rows_per_second" in run) == (name != "mlm")
    text = report({"tiny": found}, sequence_length=16, global_batch=8)
    assert "| tiny | dga gradient |" in text
    assert "Not measured" not in text
    # The targets' own shape was not measured.
    assert "| MFU of plain MLM, roberta-large, at least 50% | no | unknown |" in text


def _logged(folder: Path, losses: list[float], weights: bytes = b"weights") -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    steps = [
        {"step": step, "loss/total": loss, "grad_norm": 1.0, "step_seconds": 0.5 + step, "mfu": step * 0.1}
        for step, loss in enumerate(losses, 1)
    ]
    lines = [{"event": "evaluation", "step": 0, "domain_loss": 3.0}, *steps]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_runs_are_compared_to_the_last_bit(tmp_path: Path) -> None:
    losses = [2.0, 1.5, 0.1]
    one, same = (_logged(tmp_path / name, losses) for name in ("one", "same"))
    near = _logged(tmp_path / "near", [2.0, math.nextafter(1.5, 2), 0.1], b"weight2")
    equal, different = compared(one, same), compared(one, near)
    assert equal == {"steps": 3, "first_difference": None, "same_model": True, "step_seconds": 3.5}
    assert different == equal | {"first_difference": 2, "same_model": False}
    said = [
        next(_repeats({"tiny": {"program": {"step_seconds": 1.75}, "repeat": found}}))
        for found in (equal, different)
    ]
    assert "of 3 steps equal bit for bit, models the same; 3500.0 ms a step, 2.00 of that" in said[0]
    assert "different from step 2 on, models different" in said[1]


def test_kernels_of_two_streams_and_the_gaps_between_them() -> None:
    kernels = [Kernel("sm90_xmma_gemm", 0, 4_000), Kernel("ncclDevKernel", 3_000, 5_000)]
    kernels += [
        Kernel("sm90_xmma_gemm", 7_000, 9_000),
        Kernel("Memcpy HtoD", 8_000, 8_500),
        Kernel("x", 9_500, 10_000),
    ]
    found = summary(kernels[::-1], top=1)
    assert (found.span, found.longest_gap) == (10.0, 2.0)
    assert found.idle == pytest.approx(0.25)
    assert found.kernels == [("sm90_xmma_gemm", 2, 6.0)]
    assert found.groups == pytest.approx(
        {"matrix products": 6 / 9, "communication": 2 / 9, "copies between host and device": 0.5 / 9}
        | {"other elementwise": 0.5 / 9}
    )
