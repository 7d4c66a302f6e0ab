"""Speed of sharding against the bare tokenizer, and its memory.

    python -m benchmarks.sharding DATA [--megabytes 30] [--rounds 3]
    python -m benchmarks.sharding DATA --memory 100 1000

Each system runs in processes of its own, one after the other, round after round, on the same two compressed
files. `tokenizers` is given the texts in memory and one thread a process, and keeps nothing; the sharder is
timed from the files to the finished rows, without its imports.

With --memory: peak memory of tools/shard_corpus.py over its process tree, for texts of several sizes in MB.
Text of any size is made by repeating documents, with another number before each.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import count, cycle
from pathlib import Path
from statistics import median

import psutil

from benchmarks.common import (
    ROOT,
    SEQUENCE_LENGTH,
    WORK,
    keep_section,
    met_or_missed,
    model_of,
    on_ranks,
    options_of,
    ratios,
    spread,
    table,
)
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus

PARTS = 2
"""The number of input files."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
SYSTEMS = {
    "tokenizers, encode_batch": ("encode_batch", 1),
    "tokenizers, encode_batch_fast": ("encode_batch_fast", 1),
    "tokenizers, encode_batch_fast, 2 processes": ("encode_batch_fast", 2),
    "shard_corpus, 1 worker": ("ours", 1),
    "shard_corpus, 2 workers": ("ours", 2),
}
"""The call and the processes of each system. ``encode_batch_fast`` is the sharder's: it makes no offsets."""


def main() -> None:
    """Measure what is asked for."""
    options = options_of(__doc__, megabytes=30.0, rounds=3, memory=[])
    model = model_of(options.data, "minilm")
    WORK.mkdir(parents=True, exist_ok=True)
    corpora = [options.data / "corpora" / f"{name}.jsonl.gz" for name in ("acl", "ai")]
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        if options.memory:
            keep_section("Peak memory of sharding", memory(options.memory, model, corpora, Path(name)))
        else:
            keep_section("Speed of sharding", speed(options, model, corpora, Path(name)))


def texts_of(parts: Sequence[Path]) -> Iterator[str]:
    """Yield the documents of some files."""
    for part in parts:
        with gzip.open(part, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def write_text(corpora: Sequence[Path], paths: Sequence[Path], megabytes: float) -> None:
    """Write so much text to files in turn: the corpora again and again, no document twice."""
    left = megabytes * 1e6
    documents = (text for _ in count() for text in texts_of(corpora))
    with ExitStack() as stack:
        opened = (
            (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") for path in paths
        )
        files = cycle([stack.enter_context(file) for file in opened])
        for number, (text, file) in enumerate(zip(documents, files, strict=False)):
            document = f"{number} {text}"
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            left -= len(document.encode())
            if left <= 0:
                break


# --- speed ---


def encode(model: Path, parts: Sequence[Path], call: str) -> tuple[float, int]:
    """Tokenise this rank's part of the documents, and forget: seconds of the slowest rank, and own tokens."""
    import torch.distributed as dist
    from tokenizers import Tokenizer

    texts = list(texts_of(parts))[dist.get_rank() :: dist.get_world_size()]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = call == "encode_batch_fast"
    dist.barrier()
    started = time.perf_counter()
    tokens = sum(
        len(encoding)
        for first in range(0, len(texts), 1000)
        for encoding in getattr(tokenizer, call)(texts[first : first + 1000], add_special_tokens=False)
    )
    dist.barrier()
    return time.perf_counter() - started, tokens


def shard(model: Path, parts: Sequence[Path], workers: int) -> tuple[float, int]:
    """Shard the files, and return seconds and tokens."""
    from transformers import AutoTokenizer  # noqa: F401  # the import is not timed

    settings = ShardSettings(str(model), sequence_length=SEQUENCE_LENGTH, validation_share=0)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        started = time.perf_counter()
        report = shard_corpus(list(map(str, parts)), Path(folder, "corpus"), settings, num_workers=workers)
        return time.perf_counter() - started, report.train.maskable


def speed(options: argparse.Namespace, model: Path, corpora: Sequence[Path], folder: Path) -> str:
    """Run all systems in turns, and compare them with the raw tokenizer's rates."""
    parts = [folder / f"part-{part}.jsonl.gz" for part in range(PARTS)]
    write_text(corpora, parts, options.megabytes)
    os.environ |= ONE_THREAD
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    tokens = {}
    for number in range(options.rounds):
        for name, (call, processes) in SYSTEMS.items():
            if call == "ours":
                found = on_ranks(1, shard, model, parts, processes)
            else:
                found = on_ranks(processes, encode, model, parts, call)
            seconds[name].append(found[0][0])
            tokens[name] = sum(own for _, own in found)
            print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s", flush=True)

    def times(name: str, other: str) -> list[float]:
        """Return how many times as fast as ``other`` a system is, round by round."""
        return ratios(seconds[other], seconds[name])

    plain, fast, both, one, two = SYSTEMS
    rows = [["system", "MB/s", "tokens/s", "/ encode_batch", "/ encode_batch_fast"]]
    for name in SYSTEMS:
        typical = median(seconds[name])
        rates = [f"{options.megabytes / typical:.2f}", f"{tokens[name] / typical:,.0f}"]
        rows.append([name, *rates, spread(times(name, plain)), spread(times(name, fast))])
    of_plain, of_fast = median(times(one, plain)), median(times(one, fast))
    scaling, limit = median(times(two, one)), median(times(both, fast))
    return (
        f"{table(rows)}\n\n{options.megabytes:.1f} MB of text in {PARTS} files; median of {options.rounds} "
        "rounds (range). Targets: a worker at 0.9 or more of the raw tokenizer's rate: "
        f"{of_plain:.2f} of encode_batch's, {met_or_missed(of_plain >= 0.9)}; {of_fast:.2f} of "
        f"encode_batch_fast's, {met_or_missed(of_fast >= 0.9)}. From 1 to 2 workers 1.8 or more: "
        f"{scaling:.2f}, {met_or_missed(scaling >= 1.8)}; two processes of the raw "
        f"tokenizer reach {limit:.2f}."
    )


# --- memory ---


def memory(sizes: Sequence[float], model: Path, corpora: Sequence[Path], folder: Path) -> str:
    """Measure the peak memory of a sharder of two workers by size of the text."""
    lines = [["text, MB", "documents", "rows", "peak memory, MB", "MB/s, start included"]]
    peaks = []
    for megabytes in sizes:
        text, output = folder / "text.jsonl", folder / f"corpus-{megabytes:g}"
        write_text(corpora, [text], megabytes)
        peak, seconds = peak_memory("tools/shard_corpus.py", text, "--tokenizer", model, "--output", output,
                                    "--num_workers", 2)  # fmt: skip
        manifest = Corpus.open(output).manifest
        peaks.append(peak / 1e6)
        counts = [f"{megabytes:g}", f"{manifest.documents_read:,}", f"{manifest.rows:,}"]
        lines.append([*counts, f"{peaks[-1]:.0f}", f"{megabytes / seconds:.2f}"])
    growth = max(peaks) / min(peaks) - 1
    return f"{table(lines)}\n\nTarget: peaks within 10%: {growth:.0%} ({met_or_missed(growth <= 0.1)})."


def peak_memory(*command: object) -> tuple[int, float]:
    """Run Python on a command: the largest sum of resident bytes over its process tree, and seconds."""
    started, peak = time.perf_counter(), 0
    words = [sys.executable, *map(str, command)]
    process = psutil.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in tree))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return peak, time.perf_counter() - started


if __name__ == "__main__":
    main()
