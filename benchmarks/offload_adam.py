"""Print the time of an AdamW step on the CPU: torch's fused one, which offload uses, against DeepSpeed's.

``python -m benchmarks.offload_adam``. DeepSpeedCPUAdam is compiled on first use and needs g++.
The two take turns, so that what else the machine does falls on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    steps = {
        "torch fused": _step(lambda p: torch.optim.AdamW(p, fused=True, **settings), arguments.entries),
        "torch foreach": _step(lambda p: torch.optim.AdamW(p, foreach=True, **settings), arguments.entries),
        "DeepSpeedCPUAdam": _step(
            lambda p: DeepSpeedCPUAdam(p, adamw_mode=True, **settings), arguments.entries
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["torch fused"])
    print(f"{arguments.entries:,} entries, {torch.get_num_threads()} threads, median of {arguments.rounds}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:18} {median * 1e3:8.1f} ms   {median / base:.2f} of torch fused")


def _step(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], entries: int) -> Callable[[], object]:
    weights = torch.nn.Parameter(torch.randn(entries))
    weights.grad = torch.randn(entries)
    optimizer = make([weights])
    optimizer.step()  # allocates the moments
    return optimizer.step


if __name__ == "__main__":
    main()
