"""How long training stands still for a checkpoint, with and without ``--async_save``.

``python -m benchmarks.async_save``: a random BERT-base under ZeRO-2 in fp32 on two ranks of this machine's
CPUs, saves of both kinds in turn, so that both meet the same machine. A background save stands still for the
copy of the shard, and for the commit once all ranks have written; what its thread takes from the steps
meanwhile is told apart.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.results import append_section
from dga_scale.checkpoint.async_save import Saves
from dga_scale.checkpoint.state import Save, TrainerState
from dga_scale.launch.preemption import StopConsensus
from dga_scale.launch.world import join_cluster
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MaskedLM, Setup, tiny_engine, tiny_tokenizer, train_step

RANKS = 2


def base_size(layers: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(num_hidden_layers=layers))


def measure(folder: Path, saves_of_each: int, layers: int) -> dict[str, Any]:
    """Seconds of stalls, and of the steps without and during a background save, on this rank."""
    cluster = join_cluster()
    engine = tiny_engine(Setup(stage=2, rows=RANKS), MaskedLM(base_size(layers)))
    ways = {False: Saves(background=False), True: Saves(background=True)}
    consensus = StopConsensus(cluster)
    found: dict[str, Any] = {
        "waiting": [],
        "background": [],
        "copy": [],
        "commit": [],
        "alone": [],
        "during": [],
    }
    found["bytes"] = 12 * sum(p.numel() for p in engine.module.parameters()) // RANKS
    number = 0

    def step(kind: str, saves: Saves) -> None:
        nonlocal number
        number += 1
        cluster.barrier()
        started = time.perf_counter()
        train_step(engine, number)
        consensus.average({"loss": torch.zeros(())}, False, saves.written)
        found[kind].append(time.perf_counter() - started)

    for _ in range(2):
        step("alone", ways[True])
    found["alone"].clear()  # the first steps make Adam's moments
    for turn in range(2 * saves_of_each):
        background = turn % 2 == 1
        saves = ways[background]
        step("alone", saves)
        cluster.barrier()
        started = time.perf_counter()
        saves.begin(Save(engine, tiny_tokenizer(), folder, TrainerState(number), cluster, 1), started)
        if background:
            found["copy"].append(time.perf_counter() - started)
            while not consensus.written(saves.begun):
                step("during", saves)
        started = time.perf_counter()
        saved = saves.finish()
        assert saved is not None
        found["commit"] += [time.perf_counter() - started] if background else []
        found["background" if background else "waiting"].append(saved.seconds)
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=4, help="Of each kind.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--note", default="", help="About the machine, for the record.")
    arguments = parser.parse_args()
    from benchmarks import async_save  # this file by the name under which the ranks can import it

    folder = Path(tempfile.mkdtemp(prefix="async-save-"))
    try:
        answers = run_ranks(
            RANKS, async_save.measure, folder, arguments.saves, arguments.layers, timeout=7200
        )
    finally:
        shutil.rmtree(folder)
    slowest: dict[str, list[float]] = {
        kind: [max(both) for both in zip(*(answer[kind] for answer in answers), strict=True)]
        for kind in answers[0]
        if kind != "bytes"
    }
    waiting, background = median(slowest["waiting"]), median(slowest["background"])
    alone, during = median(slowest["alone"]), median(slowest["during"])
    size = answers[0]["bytes"] / 1e6
    rows = [
        ("stall, training waits", slowest["waiting"]),
        ("stall, `--async_save`", slowest["background"]),
        ("of which the copy", slowest["copy"]),
        ("of which the commit", slowest["commit"]),
        ("a step", slowest["alone"]),
        ("a step during a background save", slowest["during"]),
    ]
    load = f"load average {os.getloadavg()[1]:.1f}. {arguments.note}".strip()
    verdict = f"In the background a save stalls training {background / waiting:.2f} times as long"
    lines = [
        f"{size:.0f} MB a rank, {arguments.saves} saves of each kind, seconds of the slower rank; {load}",
        "",
        "| | median | all |",
        "|---|---|---|",
        *(f"| {name} | {median(all_):.2f} | {' '.join(f'{s:.2f}' for s in all_)} |" for name, all_ in rows),
        "",
        f"{verdict}; meanwhile a step takes {during / alone:.2f} times as long.",
    ]
    command = f"python -m benchmarks.async_save --saves {arguments.saves}"
    append_section("A save in the background", "\n".join(lines), command)


if __name__ == "__main__":
    main()
