"""Starts the benchmark of one GPU, once all that it needs is there: ``python -m benchmarks.gpu --help``."""

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.packages import advice, missing, refuse, run_with


def start() -> None:
    """Install wheels, or check packages and GPU, and measure."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options, rest = parser.parse_known_args()
    if options.wheels:
        sys.exit(run_with(options.wheels, [*rest, *(["--smoke"] if options.smoke else [])]))
    if lacking := missing():
        refuse(advice(lacking))
    import torch

    if not (torch.cuda.is_available() or options.smoke or {"-h", "--help"} & {*rest}):
        refuse(f"torch {torch.__version__} sees no GPU. --smoke tries the benchmark on a CPU")
    from benchmarks.gpu.benchmark import main
    from dga_scale.errors import run_main

    run_main(main)


if __name__ == "__main__":
    start()
