"""The speed of a run against its devices' peak, and its memory.

Model FLOPs utilisation (MFU) as PaLM defines it (arXiv 2204.02311, appendix B): the operations of the matrix
products that a step needs, which ``objectives.flops`` counts, over what the devices could have done in that
time.
"""

import functools
import re
import time
from dataclasses import dataclass

import psutil
import torch

_DENSE_BF16_PEAK = (
    # Name of the device as CUDA gives it, FLOP/s of dense bf16 products (fp16 where it has no bf16) from the
    # makers' data sheets. The first that stands in the device's name as whole words counts.
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # of each of its two dies, which torch shows as devices
)


@dataclass(frozen=True)
class Peak:
    """The peak of a device: FLOP/s of matrix products, and the source of the figure."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak FLOP/s of one device for products in ``dtype``.

    From the maker's data sheet for a known GPU in bf16 or fp16, measured with a short matrix product
    otherwise (a CPU, an unknown GPU, float32), once a process. All ranks of a machine should call it at once,
    as they share its cores.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, flops in _DENSE_BF16_PEAK:
            if re.search(rf"\b{known}\b", name):
                return Peak(flops, f"data sheet of {known}")
    return Peak(measured_flops(device, dtype), f"measured with a {str(dtype).removeprefix('torch.')} product")


@functools.cache
def measured_flops(
    device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3
) -> float:
    """Measure the best FLOP/s of ``size`` x ``size`` matrix products within about ``seconds``."""
    size = size if device.type == "cpu" else 8 * size
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    until = time.perf_counter() + seconds
    left @ right  # the first call sets up the kernel
    while True:
        wait_for(device)
        start = time.perf_counter()
        left @ right
        wait_for(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > until:
            return 2.0 * size**3 / best


def rates(*, tokens: int, seconds: float, flops: float, peak_flops: float) -> dict[str, float]:
    """Return ``tokens_per_second``, ``step_seconds`` and ``mfu`` of a step.

    Args:
        tokens: The real tokens of the global batch, each row counted once whatever its views.
        seconds: The wall time of the step.
        flops: The FLOPs of the step, from ``objectives.flops.step_flops``.
        peak_flops: The peak FLOP/s of all ranks' devices together.
    """
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "mfu": flops / (seconds * peak_flops),
    }


def memory_gib(device: torch.device) -> float:
    """Return this rank's memory in GiB: the peak of allocations on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all queued work; on a CPU return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
