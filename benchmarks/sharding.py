"""Speed and memory of sharding against `tokenizers` alone, `datasets.map` and datatrove.

    python benchmarks/sharding.py DATA [--megabytes 30] [--rounds 3] [--datatrove FOLDER]
    python benchmarks/sharding.py DATA --memory 100 1000

DATA is a folder with corpora/acl.jsonl.gz, corpora/ai.jsonl.gz and models/minilm-l6-mlm. Each system runs in
a process of its own, one after the other, round after round (`datasets` and datatrove in the first one only),
on the same two compressed files. `tokenizers` is given the texts in memory and one thread, and keeps nothing;
what the others do is timed from the files to the finished rows, without the imports of their libraries.
`datasets` reads, tokenises and groups as transformers' run_mlm does.
For datatrove: pip install --target FOLDER --no-deps datatrove loguru humanize orjson.

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
from contextlib import suppress
from itertools import chain, count
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
from results import append_section

from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "sharding"
SEQUENCE_LENGTH = 128
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PARTS = 2
"""Input files: datatrove shares out whole files."""

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
    team = [context.Process(target=_share, args=(model, share, barrier, counts)) for share in shares]
    for process in team:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    tokens = sum(counts.get() for _ in team)
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


def datasets_map(model: Path, parts: Sequence[Path], output: Path, workers: int) -> tuple[float, int]:
    """run_mlm's preparation: load, tokenise with special tokens and their mask, concatenate and cut."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    datasets.disable_progress_bars()

    def tokenize(examples: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer(examples["text"], return_special_tokens_mask=True, verbose=False)

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        return {
            name: [ids[first : first + SEQUENCE_LENGTH] for first in range(0, total, SEQUENCE_LENGTH)]
            for name, ids in joined.items()
        }

    processes = workers if workers > 1 else None
    started = time.perf_counter()
    files = [str(part) for part in parts]
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(output))
    tokenized = loaded.map(tokenize, batched=True, num_proc=processes, remove_columns=loaded.column_names)
    grouped = tokenized.map(group_texts, batched=True, num_proc=processes)
    return time.perf_counter() - started, len(grouped) * SEQUENCE_LENGTH


def datatrove(model: Path, parts: Sequence[Path], output: Path, workers: int) -> tuple[float, int]:
    """Its reader of JSON lines and its tokenizer, which writes one stream of ids without rows."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(parts[0].parent), glob_pattern="*.gz")
    writer = DocumentTokenizer(
        str(output / "tokens"), str(model / "tokenizer.json"), eos_token="[SEP]", shuffle_documents=False
    )
    logs = str(output / "logs")
    executor = LocalPipelineExecutor([reader, writer], tasks=workers, workers=workers, logging_dir=logs)
    started = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_size for path in (output / "tokens").glob("*.ds")) // 2


EVERY_ROUND = (raw, raw_fast, ours)
SYSTEMS: dict[str, tuple[System, int]] = {
    "tokenizers, encode_batch": (raw, 1),
    "tokenizers, encode_batch_fast": (raw_fast, 1),
    "tokenizers, encode_batch_fast, 2 processes": (raw_fast, 2),
    "shard_corpus, 1 worker": (ours, 1),
    "shard_corpus, 2 workers": (ours, 2),
    "datasets.map, 1 process": (datasets_map, 1),
    "datasets.map, 2 processes": (datasets_map, 2),
    "datatrove, 1 worker": (datatrove, 1),
    "datatrove, 2 workers": (datatrove, 2),
}


def main() -> None:
    """Measure what is asked for; print it and keep it in RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--megabytes", type=float, default=30, help="text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datatrove", type=Path, help="folder where it is installed (default: left out)")
    parser.add_argument("--memory", type=float, nargs="+", metavar="MB", help="measure memory at these sizes")
    parser.add_argument("--system", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.data / "models" / "minilm-l6-mlm"
    if options.system:
        system, workers = SYSTEMS[options.system]
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            parts = sorted((WORK / "text").glob("*.gz"))
            print(json.dumps(system(model, parts, Path(folder), workers)))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    corpora = [options.data / "corpora" / f"{name}.jsonl.gz" for name in ("acl", "ai")]
    if options.memory:
        title, body = "Peak memory of sharding", memory_table(options.memory, model, corpora)
    else:
        title, body = "Speed of sharding", speed_table(options, corpora)
    append_section(title, body, " ".join(["python", "benchmarks/sharding.py", *sys.argv[1:]]))


# --- speed ---


def speed_table(options: argparse.Namespace, corpora: Sequence[Path]) -> str:
    """All systems in turns; what they reach of the raw tokenizer's rate."""
    shutil.rmtree(WORK / "text", ignore_errors=True)
    (WORK / "text").mkdir()
    left, lines = options.megabytes * 1e6, []
    for text in texts_of(corpora):
        lines.append(json.dumps({"text": text}) + "\n")
        left -= len(text.encode())
        if left <= 0:
            break
    for part in range(PARTS):
        compressed = gzip.compress("".join(lines[part::PARTS]).encode(), compresslevel=6)
        (WORK / "text" / f"part-{part}.jsonl.gz").write_bytes(compressed)
    megabytes = options.megabytes - left / 1e6
    names = [name for name in SYSTEMS if options.datatrove or not name.startswith("datatrove")]
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            if number and SYSTEMS[name][0] not in EVERY_ROUND:
                continue
            runs[name].append(measure(name, options))
            print(f"round {number + 1}: {name} {runs[name][-1][0]:.2f} s", flush=True)
    seconds = {name: [second for second, _ in values] for name, values in runs.items()}

    def times(name: str, other: str) -> list[float]:
        """How many times as fast as ``other``, round by round."""
        return [b / a for a, b in zip(seconds[name], seconds[other], strict=False)]

    baselines = names[:2]
    table = ["| system | MB/s | tokens/s | / encode_batch | / encode_batch_fast |", "|---" * 5 + "|"]
    for name in names:
        typical = statistics.median(seconds[name])
        ratios = [spread(times(name, baseline)) for baseline in baselines]
        tokens = runs[name][0][1] / typical
        table.append(f"| {name} | {megabytes / typical:.2f} | {tokens:,.0f} | {' | '.join(ratios)} |")
    one, two = (f"shard_corpus, {workers}" for workers in ("1 worker", "2 workers"))
    per_worker = [statistics.median(times(one, baseline)) for baseline in baselines]
    scaling = statistics.median(times(two, one))
    limit = statistics.median(times("tokenizers, encode_batch_fast, 2 processes", baselines[1]))
    said = (
        f"{megabytes:.1f} MB of text in {PARTS} files; median of {options.rounds} rounds (range), of "
        "`datasets` and datatrove one. Targets: a "
        f"worker at 0.9 or more of the raw tokenizer's rate: {per_worker[0]:.2f} of encode_batch's, "
        f"{verdict(per_worker[0] >= 0.9)}; {per_worker[1]:.2f} of encode_batch_fast's, "
        f"{verdict(per_worker[1] >= 0.9)}. From 1 to 2 workers 1.8 or more: {scaling:.2f}, "
        f"{verdict(scaling >= 1.8)}; two processes of the raw tokenizer reach {limit:.2f}."
    )
    if not options.datatrove:
        said += " datatrove not installed: skipped."
    return "\n".join([*table, "", said])


def measure(name: str, options: argparse.Namespace) -> tuple[float, int]:
    """Run a system in a process of its own: seconds and tokens."""
    command = [sys.executable, __file__, str(options.data), "--system", name]
    environment = os.environ | ONE_THREAD
    if options.datatrove:
        environment["PYTHONPATH"] = str(options.datatrove.resolve())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    seconds, tokens = json.loads(done.stdout.splitlines()[-1])
    return seconds, tokens


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def verdict(met: bool) -> str:
    """Whether a target is met."""
    return "met" if met else "missed"


# --- memory ---


def memory_table(sizes: Sequence[float], model: Path, corpora: Sequence[Path]) -> str:
    """Peak memory of a sharder of two workers by size of the text."""
    lines = ["| text, MB | documents | rows | peak memory, MB | MB/s, start included |", "|---" * 5 + "|"]
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
        lines.append(
            f"| {megabytes:g} | {manifest.documents_read:,} | {manifest.rows:,} | {peaks[-1]:.0f} | "
            f"{megabytes / seconds:.2f} |"
        )
    growth = max(peaks) / min(peaks) - 1
    return "\n".join([*lines, "", f"Target: peaks within 10%: {growth:.0%} ({verdict(growth <= 0.1)})."])


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
