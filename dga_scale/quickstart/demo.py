"""Run ``make demo``: the whole path on real text and a real model, in minutes, on two cores or on GPUs."""

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dga_scale.logging.evaluations import BeforeAfter
from dga_scale.logging.json_lines import LOG_FILE
from dga_scale.quickstart.prepare import FOLDER, defaults, repository, run_command
from dga_scale.run_folder import RunFolder

MASTER_PORT = 29500
"""DeepSpeed's default port for the rendezvous."""


def demo(folder: Path = FOLDER) -> int:
    """Run the steps that are not complete yet, show the results, and return the exit code."""
    started = time.monotonic()
    settings = defaults(folder)
    run = RunFolder(Path(settings["output_dir"]))
    complete = run.report.exists()
    if not complete:
        _train(settings)
    show(folder, run)
    minutes = (time.monotonic() - started) / 60
    print("This demo was complete already." if complete else f"That took {minutes:.1f} minutes.")
    return 0


def _train(settings: dict[str, Any]) -> None:
    """Train with DGA under ZeRO-2, on all GPUs or on two ranks that share the cores."""
    launcher: list[object] = ["deepspeed", "-q"]
    environment = {}
    if not torch.cuda.is_available():
        launcher += ["--num_accelerators", 2]
        # With as many threads as cores each, the two ranks would oversubscribe the machine.
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 2))
    if (port := _port()) != MASTER_PORT:
        launcher += ["--master_port", port]
    root = repository()
    run_command(
        *launcher, root / "launchers" / "dga_train.py", "--ds_config", root / "ds_configs" / "zero2.json",
        *(word for name, value in settings.items()
          for word in (f"--{name}", *(value if isinstance(value, list) else [value]))),
        environment=environment,
    )  # fmt: skip


def _port() -> int:
    """Return DeepSpeed's default port for the rendezvous, or a free one where another run uses it."""
    for port in (MASTER_PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise AssertionError("the system always has a free port")


def show(folder: Path, run: RunFolder) -> None:
    """Print the losses before and after training, and the paths of the results."""
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    console = Console(highlight=False)
    table = Table(
        title=f"The demo: DGA on {summary['tokens']:,} tokens of documentation of scientific Python"
    )
    table.add_column("held-out text")
    for column in ("loss before", "loss after", "change", "perplexity"):
        table.add_column(column, justify="right")
    for name, what in (("domain", "domain: docstrings"), ("general", "general: Wikipedia")):
        found = BeforeAfter(**summary[f"{name}_loss"])
        perplexity = " to ".join(_perplexity(loss) for loss in found if loss is not None)
        table.add_row(what, *found.cells(".3f"), perplexity)
    console.print()
    console.print(table)
    paths = {
        "adapted model": f"{run.model} (AutoModelForMaskedLM.from_pretrained)",
        "report": run.report,
        **({"TensorBoard": f"tensorboard --logdir {run.tensorboard}"} if run.tensorboard.exists() else {}),
        "log": run.path / LOG_FILE,
        "model before": folder / "base" / "model",
        "corpora": folder / "corpora",
    }
    for name, path in paths.items():
        console.print(f"{name:>14}: {path}", soft_wrap=True)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.0f}"
