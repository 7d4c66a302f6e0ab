"""Time and memory of saving, resuming and consolidating, against DeepSpeed's own and torch.save.

    python -m benchmarks.checkpoints [--rounds 3] [--stages 2 3] [--layers 12]

A RoBERTa-base-shaped random model in bf16 under ZeRO on two ranks of this machine's CPUs. All systems take
turns, round after round, on the same engine and disk:

ours         ``Save``: fp32 weights and moments, every byte hashed, synced and committed; the resume reads and
             compares all hashes first. ``consolidate`` verifies the whole checkpoint too.
deepspeed    ``engine.save_checkpoint``, ``load_checkpoint``, and ``zero_to_fp32``, with torch.save: into
             safetensors it refuses a model with tied weights.
torch.save   of the very tensors that ours writes, one file a rank; ``torch.load`` and a copy into place.

Neither rival hashes or waits for the disk, so each has a second figure that ends when its files are synced
as well. Files are read from the system's cache. Memory is what a rank takes beyond what it held before, pages
of files apart: the system can drop those.
"""

import argparse
import os
import shutil
import sys
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

from benchmarks.results import append_section
from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.state import Save, TrainerState, load_checkpoint
from dga_scale.checkpoint.store import find_resume_point
from dga_scale.launch.world import join_cluster
from dga_scale.storage.atomic import sync
from tests.helpers.ranks import run_ranks
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
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
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


def table(ranks: list[Figures], sizes: dict[str, int]) -> list[str]:
    """Medians over the rounds of the slower and larger rank, beside ours."""
    lines = ["| | MB | seconds, all rounds | median | to ours | most memory of a rank, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in ranks[0]:
        seconds = [max(r[name][i][0] for r in ranks) for i in range(len(ranks[0][name]))]
        kind, system = name.split(": ")
        ours = median(max(r[f"{kind}: ours"][i][0] for r in ranks) for i in range(len(seconds)))
        memory = max(bytes_ for r in ranks for _, bytes_ in r[name])
        written = sizes[("whole " if kind == "consolidate" else "") + system.split(",")[0]]
        every = " ".join(f"{s:.2f}" for s in seconds)
        lines.append(
            f"| {name} | {written / 1e6:.0f} | {every} | {median(seconds):.2f} "
            f"| {median(seconds) / ours:.2f} | {memory / MIB:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    from benchmarks import checkpoints  # this file by the name under which the ranks can import it

    lines = [
        f"{RANKS} ranks, {options.rounds} rounds in turns, load {os.getloadavg()[0]:.1f} at the start.",
        'Seconds of the slower rank; "to ours" is over ours: above 1, we are faster.',
    ]
    for stage in options.stages:
        folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
        try:
            arguments = (folder, stage, options.rounds, options.layers)
            ranks = run_ranks(RANKS, checkpoints.on_each_rank, *arguments, timeout=1200)
            whole = run_ranks(1, checkpoints.on_one, folder, options.rounds, timeout=1200)
            sizes = {name: bytes_of(folder / path) for name, path in (
                ("ours", "ours"), ("deepspeed", "deepspeed"), ("torch.save", "torch"),
                ("whole ours", "ours whole"), ("whole deepspeed", "deepspeed whole"))}  # fmt: skip
        finally:
            shutil.rmtree(folder)
        lines += ["", f"ZeRO-{stage}", "", *table(ranks, sizes), *table(whole, sizes)[2:]]
    command = " ".join(["python -m benchmarks.checkpoints", *sys.argv[1:]])
    append_section("Checkpoints: time and memory", "\n".join(lines), command)


if __name__ == "__main__":
    main()
