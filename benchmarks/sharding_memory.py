"""Peak memory and speed of sharding, for corpora of several sizes side by side.

    python benchmarks/sharding_memory.py CORPUS.jsonl.gz ... --tokenizer MODEL [--sizes 100 1000]

Each corpus is made by repeating the documents of the given files, each repetition with a new document id,
which also begins its text, so that no document is an exact duplicate of another. What is measured is
``tools/shard_corpus.py`` as a user runs it: the largest sum of resident memory over its process tree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from results import append_section

from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.sources import Reading, Segment, find_sources, read_segment

SHARDER = Path(__file__).resolve().parent.parent / "tools" / "shard_corpus.py"
SAMPLING_SECONDS = 0.05


def make_corpus(inputs: Sequence[str], path: Path, megabytes: float) -> None:
    """Write ``megabytes`` of text as jsonl."""
    reading = Reading(text_field="text", whole_files=False)
    left, number = megabytes * 1e6, 0
    with open(path, "w", encoding="utf-8") as file:
        while True:
            for index, source in enumerate(find_sources(inputs)):
                for text in read_segment(source, Segment(index, 0, None, 0), reading):
                    document = f"{number} {text}"
                    file.write(json.dumps({"id": number, "text": document}, ensure_ascii=False) + "\n")
                    number += 1
                    left -= len(document.encode())
                    if left <= 0:
                        return


def peak_memory(command: Sequence[str]) -> tuple[float, float]:
    """Run ``command``: peak resident bytes of its process tree, and seconds."""
    started = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            tree = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in tree:
            with suppress(psutil.NoSuchProcess):  # ended since it was listed
                total += member.memory_info().rss
        peak = max(peak, total)
        time.sleep(SAMPLING_SECONDS)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.monotonic() - started


def main() -> None:
    """Measure each size; print the table and keep it in RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="CORPUS.jsonl.gz")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[100, 1000], help="megabytes of text")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--folder", default=None, help="where the corpora are made, and removed (default: /tmp)"
    )
    options = parser.parse_args()
    lines = ["| text, MB | documents | rows | peak memory, MB | MB/s |", "|---|---|---|---|---|"]
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            text, output = Path(folder, "text.jsonl"), Path(folder, "corpus")
            make_corpus(options.inputs, text, size)
            command = [sys.executable, str(SHARDER), str(text), "--tokenizer", options.tokenizer]
            command += ["--output", str(output), "--num_workers", str(options.num_workers)]
            peak, seconds = peak_memory(command)
            manifest = Corpus.open(output).manifest
        lines.append(
            f"| {size:g} | {manifest.documents_read:,} | {manifest.rows:,} | {peak / 1e6:.0f} | "
            f"{size / seconds:.2f} |"
        )
    append_section("Sharding", "\n".join(lines), " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
