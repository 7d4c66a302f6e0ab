"""What a device does over time: its kernels, when it waits for the host, and where the host waits for it."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import ROOT
from dga_scale.logging.throughput import wait_for

GROUPS = (
    # The first pattern that is found in a kernel's name says what it does.
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimizer and norms", r"multi_tensor|adam|lpnorm"),
    ("copies between host and device", r"^Memcpy (HtoD|DtoH)|pinned"),
    ("copies on the device, fills", r"^Memcpy|^Memset|fill|copy_kernel|direct_copy|CatArray"),
    ("communication", r"nccl"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|mm_|sm\d+_|addmm|linear"),
    ("softmax and cross-entropy", r"softmax|nll|cross_entropy"),
    ("layer norm", r"layer_norm|layernorm|GammaBeta"),
    ("dropout", r"dropout|bernoulli|philox"),
    ("indexing", r"index|gather|scatter|embedding"),
    ("sums", r"reduce|sum"),
)


class Kernel(NamedTuple):
    """Something that ran on the device; times in microseconds."""

    name: str
    start: float
    end: float


class Trace(NamedTuple):
    """What was recorded of some steps.

    Attributes:
        span: from the first kernel's start to the last one's end, in ms.
        idle: share of it in which nothing ran.
        longest_gap: in ms.
        groups: share of the busy time by what a kernel does.
        kernels: the longest: name, number of calls, ms together.

    """

    span: float
    idle: float
    longest_gap: float
    groups: dict[str, float]
    kernels: list[tuple[str, int, float]]


def record(run: Callable[[], object], device: torch.device, top: int = 12) -> Trace:
    """Trace what ``run`` does on ``device``; on a CPU its operators stand for kernels."""
    cuda = device.type == "cuda"
    wait_for(device)
    # Without the operators of the host, whose recording would slow it down and show as gaps.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        wait_for(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return summary(
        [
            Kernel(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == wanted and not event.is_user_annotation
        ],
        top,
    )


def summary(kernels: Sequence[Kernel], top: int) -> Trace:
    """Figures of kernels in any order, those of several streams side by side."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    first, last = ordered[0].start, max(kernel.end for kernel in ordered)
    gaps, until = [0.0], first
    for kernel in ordered:
        gaps.append(max(0.0, kernel.start - until))
        until = max(until, kernel.end)
    calls: Counter[str] = Counter()
    spent: dict[str, float] = {}
    groups: dict[str, float] = {}
    for kernel in ordered:
        took = (kernel.end - kernel.start) / 1e3
        calls[kernel.name] += 1
        spent[kernel.name] = spent.get(kernel.name, 0.0) + took
        groups[group_of(kernel.name)] = groups.get(group_of(kernel.name), 0.0) + took
    total = sum(spent.values())
    longest = sorted(spent, key=lambda name: -spent[name])[:top]
    return Trace(
        span=(last - first) / 1e3,
        idle=sum(gaps) / (last - first),
        longest_gap=max(gaps) / 1e3,
        groups={name: took / total for name, took in sorted(groups.items(), key=lambda item: -item[1])},
        kernels=[(name, calls[name], spent[name]) for name in longest],
    )


def group_of(name: str) -> str:
    """What a kernel does, by its name."""
    for group, pattern in GROUPS:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return "other elementwise"


def waits(run: Callable[[], object], device: torch.device) -> Counter[str]:
    """Where the host waits for the device during ``run``: lines of code, and how often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return Counter(_place(w.filename, w.lineno) for w in caught if "called a synchronizing" in str(w.message))


def _place(filename: str, line: int) -> str:
    """A file of this repository, or of a package, without what comes before it."""
    path = Path(filename)
    inside = path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else None
    if inside is None and path.is_relative_to(ROOT):
        inside = path.relative_to(ROOT).parts
    return f"{'/'.join(inside or path.parts)}:{line}"
