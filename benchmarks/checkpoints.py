"""Time and memory of saving, resuming and consolidating; how long training stands still for a save.

    python -m benchmarks.checkpoints [--rounds 3] [--stages 2 3] [--layers 12]
    python -m benchmarks.checkpoints --background [--rounds 4] [--layers 12]

A RoBERTa-base-shaped random model in bf16 under ZeRO on two ranks of this machine's CPUs. All systems take
turns, round after round, on the same engine and disk:

ours         ``Save``: fp32 weights and moments, every byte hashed, synced and committed; the resume reads and
             compares all hashes first. ``consolidate`` verifies the whole checkpoint too.
deepspeed    ``engine.save_checkpoint``, ``load_checkpoint``, and ``zero_to_fp32``, with torch.save: into
             safetensors it refuses a model with tied weights.
torch.save   of the very tensors that ours writes, one file a rank; ``torch.load`` and a copy into place.

Neither of the others hashes or waits for the disk, so each has a second figure that ends when its files are
synced as well. Files are read from the system's cache. Memory is what a rank takes beyond what it held
before, pages of files apart: the system can drop those.

With --background: our saves with and without ``--async_save`` in turn, under ZeRO-2 in fp32. A background
save stands still for the copy of the shard, and for the commit once all ranks have written; what its thread
takes from the steps meanwhile is told apart.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from benchmarks.common import keep_section, on_ranks, parser_of, table
from dga_scale.checkpoint.async_save import Saves
from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.state import Save, TrainerState, load_checkpoint
from dga_scale.checkpoint.store import find_resume_point
from dga_scale.launch.preemption import StopConsensus
from dga_scale.launch.world import join_cluster
from dga_scale.storage.atomic import sync
from tests.helpers.training import MaskedLM, Setup, tiny_engine, tiny_tokenizer, train_step

RANKS = 2
MIB = 2**20
Figures = dict[str, list[tuple[float, float]]]
"""By what was done: seconds and peak bytes, once a round."""


def own_bytes() -> int:
    """Memory of this process that is not pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


class Clock:
    """Seconds and peak memory of what runs in the block."""

    def __init__(self, found: Figures) -> None:
        self.found = found

    @contextmanager
    def __call__(self, name: str, folder: Path | None = None) -> Iterator[None]:
        """Note a figure under ``name``; with ``folder``, another one that ends when its files are synced."""
        before = peak = own_bytes()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.01):
                peak = max(peak, own_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
        self.found.setdefault(name, []).append((seconds, max(peak, own_bytes()) - before))
        if folder is not None:
            started = time.perf_counter()
            for path in (*filter(Path.is_file, folder.rglob("*")), folder):
                sync(path)
            self.found.setdefault(f"{name}, then synced", []).append(
                (seconds + time.perf_counter() - started, peak - before)
            )


def base_size(layers: int) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return RobertaForMaskedLM(RobertaConfig(num_hidden_layers=layers, **sizes))


def on_each_rank(folder: Path, stage: int, rounds: int, layers: int) -> Figures:
    """Save and load in turns; what the last round saved stays in ``folder``."""
    cluster = join_cluster()
    engine = tiny_engine(Setup(stage=stage, precision="bf16", rows=RANKS), MaskedLM(base_size(layers)))
    train_step(engine, 1)  # makes Adam's moments
    found: Figures = {}
    clock = Clock(found)
    ours, theirs, plain = (folder / name for name in ("ours", "deepspeed", "torch"))

    def clear(path: Path) -> None:
        if cluster.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        os.sync()  # what the last one left to the system is not this one's to wait for
        cluster.barrier()

    def save_ours() -> None:
        save = Save(engine, tiny_tokenizer(), ours, TrainerState(1), cluster, 1)
        save.write()
        save.commit()

    def load_ours() -> None:
        checkpoint = find_resume_point(ours, "auto", cluster)
        assert checkpoint is not None
        load_checkpoint(engine, checkpoint, cluster)

    described = Save(engine, tiny_tokenizer(), folder / "never written", TrainerState(1), cluster)
    content = {entry.name: entry.produce() for entry in described.entries}
    file = plain / f"{cluster.rank}.pt"

    def load_plain() -> None:
        for name, tensor in torch.load(file).items():
            content[name].copy_(tensor)

    def theirs_saved() -> None:
        engine.save_checkpoint(str(theirs), tag="one")

    ways: tuple[tuple[str, Path, Callable[[], Any], Callable[[], Any]], ...] = (
        ("ours", ours, save_ours, load_ours),
        ("deepspeed", theirs, theirs_saved, lambda: engine.load_checkpoint(str(theirs), tag="one")),
        ("torch.save", plain, lambda: torch.save(content, file), load_plain),
    )
    for _ in range(rounds):
        for name, path, write, read in ways:
            clear(path)
            with clock(f"save: {name}", None if name == "ours" else path):
                write()
                cluster.barrier()
            cluster.barrier()
            with clock(f"load: {name}"):
                read()
                cluster.barrier()
    engine.destroy()
    return found


def on_one(folder: Path, rounds: int) -> Figures:
    """Consolidate what was saved, in turns."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    found: Figures = {}
    clock = Clock(found)
    for _ in range(rounds):
        for name in ("ours", "deepspeed"):
            output = folder / f"{name} whole"
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            with clock(f"consolidate: {name}", None if name == "ours" else output):
                if name == "ours":
                    consolidate(folder / "ours", None, output)
                else:
                    convert_zero_checkpoint_to_fp32_state_dict(
                        str(folder / "deepspeed"), str(output), tag="one"
                    )
    return found


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def comparison(ranks: list[Figures], sizes: dict[str, int]) -> list[list[str]]:
    """Medians over the rounds of the slower and larger rank, beside ours."""
    rows = []
    for name in ranks[0]:
        kind, system = name.split(": ")
        seconds, ours = (
            [max(rank[each][i][0] for rank in ranks) for i in range(len(ranks[0][each]))]
            for each in (name, f"{kind}: ours")
        )
        memory = max(bytes_ for rank in ranks for _, bytes_ in rank[name])
        written = sizes[("whole " if kind == "consolidate" else "") + system.split(",")[0]]
        rows.append([name, f"{written / 1e6:.0f}", " ".join(f"{s:.2f}" for s in seconds)])
        rows[-1] += [f"{median(seconds):.2f}", f"{median(seconds) / median(ours):.2f}", f"{memory / MIB:.0f}"]
    return rows


def beside_others(options: argparse.Namespace) -> str:
    """Ours, DeepSpeed's and torch.save, for each stage."""
    head = ["", "MB", "seconds, all rounds", "median", "to ours", "most memory of a rank, MiB"]
    said = f"{RANKS} ranks, {options.rounds} rounds in turns, load {os.getloadavg()[0]:.1f} at the start. "
    parts = [said + 'Seconds of the slower rank; "to ours" is over ours: above 1, we are faster.']
    for stage in options.stages:
        with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
            folder = Path(name)
            ranks = on_ranks(RANKS, on_each_rank, folder, stage, options.rounds, options.layers)
            whole = on_ranks(1, on_one, folder, options.rounds)
            sizes = {name: bytes_of(folder / path) for name, path in (
                ("ours", "ours"), ("deepspeed", "deepspeed"), ("torch.save", "torch"),
                ("whole ours", "ours whole"), ("whole deepspeed", "deepspeed whole"))}  # fmt: skip
        rows = [head, *comparison(ranks, sizes), *comparison(whole, sizes)]
        parts += [f"ZeRO-{stage}", table(rows)]
    return "\n\n".join(parts)


# --- saves in the background ---


def stalls(folder: Path, rounds: int, layers: int) -> dict[str, list[float]]:
    """Seconds of stalls, and of the steps without and during a background save, on this rank."""
    cluster = join_cluster()
    engine = tiny_engine(Setup(stage=2, rows=RANKS), MaskedLM(base_size(layers)))
    consensus, number = StopConsensus(cluster), 0
    kinds = ("waiting", "background", "copy", "commit", "alone", "during")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}

    def step(kind: str, saves: Saves) -> None:
        nonlocal number
        number += 1
        cluster.barrier()
        started = time.perf_counter()
        train_step(engine, number)
        consensus.average({"loss": torch.zeros(())}, False, saves.written)
        found[kind].append(time.perf_counter() - started)

    ways = Saves(background=False), Saves(background=True)
    for _ in range(2):  # which make Adam's moments
        step("alone", ways[0])
    found["alone"].clear()
    for background in (False, True) * rounds:
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
        if background:
            found["commit"].append(time.perf_counter() - started)
        found["background" if background else "waiting"].append(saved.seconds)
    engine.destroy()
    return found


def in_background(options: argparse.Namespace) -> str:
    """Stalls of saves that are waited for, and of those in the background."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        ranks = on_ranks(RANKS, stalls, Path(folder), options.rounds, options.layers)
        size = bytes_of(Path(folder)) / RANKS / 1e6
    slower = {kind: [max(both) for both in zip(*(r[kind] for r in ranks), strict=True)] for kind in ranks[0]}
    middle = {kind: median(seconds) for kind, seconds in slower.items()}
    rows = [["", "median", "all"]]
    for name, kind in (
        ("stall, training waits", "waiting"),
        ("stall, `--async_save`", "background"),
        ("of which the copy", "copy"),
        ("of which the commit", "commit"),
        ("a step", "alone"),
        ("a step during a background save", "during"),
    ):
        rows.append([name, f"{middle[kind]:.2f}", " ".join(f"{s:.2f}" for s in slower[kind])])
    return (
        f"{size:.0f} MB a rank, {options.rounds} saves of each kind, seconds of the slower rank; load "
        f"average {os.getloadavg()[1]:.1f}.\n\n{table(rows)}\n\nIn the background a save stalls training "
        f"{middle['background'] / middle['waiting']:.2f} times as long; meanwhile a step takes "
        f"{middle['during'] / middle['alone']:.2f} times as long."
    )


def main() -> None:
    """Measure the one or the other."""
    parser = parser_of(__doc__, data=False)
    parser.add_argument("--background", action="store_true", help="saves that training does not wait for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    if options.background:
        keep_section("A save in the background", in_background(options))
    else:
        keep_section("Checkpoints: time and memory", beside_others(options))


if __name__ == "__main__":
    main()
