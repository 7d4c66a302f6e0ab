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

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.common import keep_section, on_ranks, options_of, roberta_base, table
from dga_scale.storage.atomic import sync

if TYPE_CHECKING:  # what the ranks need of these they import themselves: --help does not wait for it
    from deepspeed import DeepSpeedEngine

    from dga_scale.checkpoint.async_save import Saves
    from dga_scale.launch.world import Cluster

RANKS = 2
MIB = 2**20
Figures = dict[str, list[tuple[float, float]]]
"""Seconds and peak bytes, once a round, by what was done."""


def own_bytes() -> int:
    """Return the memory of this process that is not pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@contextmanager
def clock(found: Figures, name: str, folder: Path | None = None) -> Iterator[None]:
    """Note seconds and peak memory of the block; with ``folder``, also those until its files are synced."""
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
    memory = max(peak, own_bytes()) - before
    found.setdefault(name, []).append((seconds, memory))
    if folder is not None:
        started = time.perf_counter()
        for path in (*filter(Path.is_file, folder.rglob("*")), folder):
            sync(path)
        synced = seconds + time.perf_counter() - started
        found.setdefault(f"{name}, then synced", []).append((synced, memory))


def engine_of(stage: int, precision: str, layers: int) -> "DeepSpeedEngine":
    """Return an engine with a model of RoBERTa-base's shape that has made Adam's moments."""
    import torch
    from transformers import RobertaForMaskedLM

    from tests.helpers.training import MaskedLM, Setup, tiny_engine, train_step

    torch.manual_seed(0)
    setup = Setup(stage=stage, precision=precision, rows=RANKS)
    engine = tiny_engine(setup, MaskedLM(RobertaForMaskedLM(roberta_base(layers))))
    train_step(engine, 1)
    return engine


def systems(
    engine: "DeepSpeedEngine", cluster: "Cluster", folder: Path
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return how each system saves, in a folder of its name, and loads."""
    import torch

    from dga_scale.checkpoint.state import Save, TrainerState, load_checkpoint
    from dga_scale.checkpoint.store import find_resume_point
    from tests.helpers.training import tiny_tokenizer

    ours, theirs = folder / "ours", folder / "deepspeed"
    described = Save(engine, tiny_tokenizer(), folder / "never written", TrainerState(1), cluster)
    content = {entry.name: entry.produce() for entry in described.entries}
    file = folder / "torch.save" / f"{cluster.rank}.pt"

    def save_ours() -> None:
        save = Save(engine, tiny_tokenizer(), ours, TrainerState(1), cluster, 1)
        save.write()
        save.commit()

    def load_ours() -> None:
        checkpoint = find_resume_point(ours, "auto", cluster)
        assert checkpoint is not None
        load_checkpoint(engine, checkpoint, cluster)

    def load_plain() -> None:
        for name, tensor in torch.load(file).items():
            content[name].copy_(tensor)

    return {
        "ours": {"save": save_ours, "load": load_ours},
        "deepspeed": {
            "save": lambda: engine.save_checkpoint(str(theirs), tag="one"),
            "load": lambda: engine.load_checkpoint(str(theirs), tag="one"),
        },
        "torch.save": {"save": lambda: torch.save(content, file), "load": load_plain},
    }


def in_turns(folder: Path, stage: int, rounds: int, layers: int) -> Figures:
    """Save and load in turns; what the last round wrote stays in ``folder``."""
    from dga_scale.launch.world import join_cluster

    cluster = join_cluster()
    engine = engine_of(stage, "bf16", layers)
    found: Figures = {}
    compared = systems(engine, cluster, folder)
    for _ in range(rounds):
        for name, system in compared.items():
            for what, run in system.items():
                if cluster.rank == 0 and what == "save":
                    shutil.rmtree(folder / name, ignore_errors=True)
                    (folder / name).mkdir()
                os.sync()  # what the last one left to the system is not this one's to wait for
                cluster.barrier()
                synced = what == "save" and name != "ours"
                with clock(found, f"{what}: {name}", folder / name if synced else None):
                    run()
                    cluster.barrier()
    engine.destroy()
    return found


def consolidate_in_turns(folder: Path, rounds: int) -> Figures:
    """Consolidate what was saved, in turns, in a process of its own: a rank's keeps what it has freed."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    from dga_scale.checkpoint.export import consolidate

    found: Figures = {}
    for _ in range(rounds):
        for name in ("ours", "deepspeed"):
            output = folder / f"{name} whole"
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            with clock(found, f"consolidate: {name}", None if name == "ours" else output):
                if name == "ours":
                    consolidate(folder / name, None, output)
                else:
                    convert_zero_checkpoint_to_fp32_state_dict(str(folder / name), str(output), tag="one")
    return found


def bytes_of(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def beside_others(stages: list[int], rounds: int, layers: int) -> str:
    """Compare ours, DeepSpeed's and torch.save, for each stage, by the slower and larger rank."""
    rows = [["ZeRO", "", "MB", "seconds, all rounds", "median", "to ours", "most memory of a rank, MiB"]]
    said = f"{RANKS} ranks, {rounds} rounds in turns, load {os.getloadavg()[0]:.1f} at the start. "
    for stage in stages:
        with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
            ranks = on_ranks(RANKS, in_turns, Path(name), stage, rounds, layers)
            ranks += on_ranks(1, consolidate_in_turns, Path(name), rounds)
            sizes = {path.name: bytes_of(path) for path in Path(name).iterdir()}
        slower: dict[str, list[float]] = {}
        for what in {what: None for rank in ranks for what in rank}:
            every = [rank[what] for rank in ranks if what in rank]
            slower[what] = [max(seconds for seconds, _ in turn) for turn in zip(*every, strict=True)]
            memory = max(bytes_ for rank in every for _, bytes_ in rank)
            kind, _, system = what.partition(", ")[0].partition(": ")
            written = sizes[f"{system} whole" if kind == "consolidate" else system]
            middle, ours = median(slower[what]), median(slower[f"{kind}: ours"])
            rows.append(
                [str(stage), what, f"{written / 1e6:.0f}", " ".join(f"{s:.2f}" for s in slower[what])]
            )
            rows[-1] += [f"{middle:.2f}", f"{middle / ours:.2f}", f"{memory / MIB:.0f}"]
    return f'{said}Seconds of the slower rank; "to ours": above 1, we are faster.\n\n{table(rows)}'


# --- saves in the background ---

KINDS = {
    "waiting": "stall, training waits",
    "background": "stall, `--async_save`",
    "copy": "of which the copy",
    "commit": "of which the commit",
    "alone": "a step",
    "during": "a step during a background save",
}
"""What is measured, and its name in the table."""


def stalls(folder: Path, rounds: int, layers: int) -> dict[str, list[float]]:
    """Return the seconds of what ``KINDS`` names, on this rank."""
    import torch

    from dga_scale.checkpoint.async_save import Saves
    from dga_scale.checkpoint.state import Save, TrainerState
    from dga_scale.launch.preemption import StopConsensus
    from dga_scale.launch.world import join_cluster
    from tests.helpers.training import tiny_tokenizer, train_step

    cluster = join_cluster()
    engine = engine_of(2, "fp32", layers)
    consensus, number = StopConsensus(cluster), 1
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def step(kind: str, saves: "Saves") -> None:
        nonlocal number
        number += 1
        cluster.barrier()
        started = time.perf_counter()
        train_step(engine, number)
        consensus.average({"loss": torch.zeros(())}, False, saves.written)
        found[kind].append(time.perf_counter() - started)

    ways = Saves(background=False), Saves(background=True)
    step("alone", ways[0])
    found["alone"].clear()  # the first ones are slower
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


def in_background(rounds: int, layers: int) -> str:
    """Compare stalls of saves that are waited for with those of saves in the background."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        ranks = on_ranks(RANKS, stalls, Path(folder), rounds, layers)
        size = bytes_of(Path(folder)) / RANKS / 1e6
    slower = {kind: [max(both) for both in zip(*(r[kind] for r in ranks), strict=True)] for kind in KINDS}
    middle = {kind: median(seconds) for kind, seconds in slower.items()}
    rows = [["", "median", "all"]]
    for kind, name in KINDS.items():
        rows.append([name, f"{middle[kind]:.2f}", " ".join(f"{s:.2f}" for s in slower[kind])])
    return (
        f"{size:.0f} MB a rank, {rounds} saves of each kind, seconds of the slower rank; load "
        f"average {os.getloadavg()[1]:.1f}.\n\n{table(rows)}\n\nIn the background a save stalls training "
        f"{middle['background'] / middle['waiting']:.2f} times as long; meanwhile a step takes "
        f"{middle['during'] / middle['alone']:.2f} times as long."
    )


def main() -> None:
    """Measure the one or the other."""
    options = options_of(__doc__, data=False, background=False, rounds=3, stages=[2, 3], layers=12)
    if options.background:
        keep_section("A save in the background", in_background(options.rounds, options.layers))
    else:
        body = beside_others(options.stages, options.rounds, options.layers)
        keep_section("Checkpoints: time and memory", body)


if __name__ == "__main__":
    main()
