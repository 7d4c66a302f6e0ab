"""Speed of sharding against the bare tokenizer, and its memory.

    python -m benchmarks.sharding DATA [--megabytes 30] [--rounds 3]
    python -m benchmarks.sharding DATA --memory 100 1000

Each system runs in a process of its own, one after the other, round after round, on the same two compressed
files. `tokenizers` is given the texts in memory and one thread, and keeps nothing; the sharder is timed from
the files to the finished rows, without its imports.

With --memory: peak memory of tools/shard_corpus.py over its process tree, for texts of several sizes, made by
repeating documents with another number before each.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil

from benchmarks.common import (
    ROOT,
    SEQUENCE_LENGTH,
    WORK,
    keep_section,
    met_or_missed,
    model_of,
    parser_of,
    ratios,
    spread,
    table,
)
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus

TEXT = WORK / "sharding-text"
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PARTS = 2
"""Input files."""

# Each system: DATA's model folder, the input files, an empty folder, workers -> seconds and tokens.
System = Callable[[Path, Sequence[Path], Path, int], tuple[float, int]]


def texts_of(parts: Sequence[Path]) -> Iterator[str]:
    """The documents of some input files."""
    for part in parts:
        with gzip.open(part, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def encode(model: Path, texts: Sequence[str], fast: bool) -> int:
    """Tokenise and forget; how many tokens. ``fast`` is the call that the sharder makes: no offsets."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = fast
    call = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    return sum(
        len(encoding)
        for first in range(0, len(texts), 1000)
        for encoding in call(texts[first : first + 1000], add_special_tokens=False)
    )


def raw(model: Path, parts: Sequence[Path], output: Path, workers: int) -> tuple[float, int]:
    """`encode_batch`."""
    texts = list(texts_of(parts))
    started = time.perf_counter()
    tokens = encode(model, texts, fast=False)
    return time.perf_counter() - started, tokens


def raw_fast(model: Path, parts: Sequence[Path], output: Path, workers: int) -> tuple[float, int]:
    """`encode_batch_fast`, in as many processes as ``workers``: what the machine's cores can do at best."""
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(workers + 1), context.Queue()
    shares = [list(texts_of(parts))[index::workers] for index in range(workers)]
    executor = [context.Process(target=_share, args=(model, share, barrier, counts)) for share in shares]
    for process in executor:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    tokens = sum(counts.get() for _ in executor)
    return time.perf_counter() - started, tokens


def _share(model: Path, texts: Sequence[str], barrier: Barrier, counts: "multiprocessing.Queue[int]") -> None:
    barrier.wait()
    counts.put(encode(model, texts, fast=True))


def ours(model: Path, parts: Sequence[Path], output: Path, workers: int) -> tuple[float, int]:
    """The sharder."""
    from transformers import AutoTokenizer  # noqa: F401  # the import is not timed

    settings = ShardSettings(str(model), sequence_length=SEQUENCE_LENGTH, validation_share=0)
    started = time.perf_counter()
    report = shard_corpus([str(part) for part in parts], output / "corpus", settings, num_workers=workers)
    return time.perf_counter() - started, report.train.maskable


SYSTEMS: dict[str, tuple[System, int]] = {
    "tokenizers, encode_batch": (raw, 1),
    "tokenizers, encode_batch_fast": (raw_fast, 1),
    "tokenizers, encode_batch_fast, 2 processes": (raw_fast, 2),
    "shard_corpus, 1 worker": (ours, 1),
    "shard_corpus, 2 workers": (ours, 2),
}


def main() -> None:
    """Measure what is asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=float, default=30, help="text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, nargs="+", metavar="MB", help="measure memory at these sizes")
    options = parser.parse_args()
    model = model_of(options.data, "minilm")
    WORK.mkdir(parents=True, exist_ok=True)
    corpora = [options.data / "corpora" / f"{name}.jsonl.gz" for name in ("acl", "ai")]
    if options.memory:
        keep_section("Peak memory of sharding", memory_table(options.memory, model, corpora))
    else:
        keep_section("Speed of sharding", speed_table(options, model, corpora))


# --- speed ---


def speed_table(options: argparse.Namespace, model: Path, corpora: Sequence[Path]) -> str:
    """All systems in turns; what they reach of the raw tokenizer's rate."""
    shutil.rmtree(TEXT, ignore_errors=True)
    TEXT.mkdir(parents=True)
    left, lines = options.megabytes * 1e6, []
    for text in texts_of(corpora):
        lines.append(json.dumps({"text": text}) + "\n")
        left -= len(text.encode())
        if left <= 0:
            break
    for part in range(PARTS):
        compressed = gzip.compress("".join(lines[part::PARTS]).encode(), compresslevel=6)
        (TEXT / f"part-{part}.jsonl.gz").write_bytes(compressed)
    megabytes = options.megabytes - left / 1e6
    os.environ |= ONE_THREAD
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in SYSTEMS}
    for number in range(options.rounds):
        for name in SYSTEMS:
            runs[name].append(measure(name, model))
            print(f"round {number + 1}: {name} {runs[name][-1][0]:.2f} s", flush=True)
    seconds = {name: [second for second, _ in values] for name, values in runs.items()}

    def times(name: str, other: str) -> list[float]:
        """How many times as fast as ``other``, round by round."""
        return ratios(seconds[other], seconds[name])

    baselines = list(SYSTEMS)[:2]
    rows = [["system", "MB/s", "tokens/s", "/ encode_batch", "/ encode_batch_fast"]]
    for name in SYSTEMS:
        typical = statistics.median(seconds[name])
        rates = [f"{megabytes / typical:.2f}", f"{runs[name][0][1] / typical:,.0f}"]
        rows.append([name, *rates, *(spread(times(name, baseline)) for baseline in baselines)])
    one, two = "shard_corpus, 1 worker", "shard_corpus, 2 workers"
    per_worker = [statistics.median(times(one, baseline)) for baseline in baselines]
    scaling = statistics.median(times(two, one))
    limit = statistics.median(times("tokenizers, encode_batch_fast, 2 processes", baselines[1]))
    said = (
        f"{megabytes:.1f} MB of text in {PARTS} files; median of {options.rounds} rounds (range). Targets: a "
        f"worker at 0.9 or more of the raw tokenizer's rate: {per_worker[0]:.2f} of encode_batch's, "
        f"{met_or_missed(per_worker[0] >= 0.9)}; {per_worker[1]:.2f} of encode_batch_fast's, "
        f"{met_or_missed(per_worker[1] >= 0.9)}. From 1 to 2 workers 1.8 or more: {scaling:.2f}, "
        f"{met_or_missed(scaling >= 1.8)}; two processes of the raw tokenizer reach {limit:.2f}."
    )
    return f"{table(rows)}\n\n{said}"


def measure(name: str, model: Path) -> tuple[float, int]:
    """Run a system in a process of its own: seconds and tokens."""
    system, workers = SYSTEMS[name]
    with (
        tempfile.TemporaryDirectory(dir=WORK) as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        return process.submit(system, model, sorted(TEXT.glob("*.gz")), Path(folder), workers).result()


# --- memory ---


def memory_table(sizes: Sequence[float], model: Path, corpora: Sequence[Path]) -> str:
    """Peak memory of a sharder of two workers by size of the text."""
    lines = [["text, MB", "documents", "rows", "peak memory, MB", "MB/s, start included"]]
    peaks = []
    for megabytes in sizes:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            text, output = Path(folder, "text.jsonl"), Path(folder, "corpus")
            repeat(corpora, text, megabytes)
            command = [sys.executable, str(ROOT / "tools" / "shard_corpus.py"), str(text), "--tokenizer",
                       str(model), "--output", str(output), "--num_workers", "2"]  # fmt: skip
            peak, seconds = peak_memory(command)
            manifest = Corpus.open(output).manifest
        peaks.append(peak / 1e6)
        counts = [f"{megabytes:g}", f"{manifest.documents_read:,}", f"{manifest.rows:,}"]
        lines.append([*counts, f"{peaks[-1]:.0f}", f"{megabytes / seconds:.2f}"])
    growth = max(peaks) / min(peaks) - 1
    return f"{table(lines)}\n\nTarget: peaks within 10%: {growth:.0%} ({met_or_missed(growth <= 0.1)})."


def repeat(corpora: Sequence[Path], path: Path, megabytes: float) -> None:
    """Write ``megabytes`` of text: the corpora again and again, no document twice."""
    left, number = megabytes * 1e6, count()
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            for text in texts_of(corpora):
                document = f"{next(number)} {text}"
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                left -= len(document.encode())
                if left <= 0:
                    break


def peak_memory(command: Sequence[str]) -> tuple[int, float]:
    """Run ``command``: largest sum of resident bytes over its process tree, and seconds."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in tree))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - started


if __name__ == "__main__":
    main()
