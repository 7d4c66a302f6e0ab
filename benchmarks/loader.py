"""Speed of the loader beside torch's DataLoader, and how long a real run waits for its data.

    python benchmarks/loader.py DATA [--rounds 5]

DATA is a folder with corpora/NAME.jsonl.gz and models/minilm-l6-mlm. On packed chunks and on short reviews,
`BatchStream` and a DataLoader with DataCollatorForLanguageModeling read and mask the same rows in the same
order, in turns; the DataLoader's rows carry the masks of special tokens, as transformers' run_mlm makes them.
Nothing else runs, so a figure is the time from one batch to the next when nobody trains. Then short runs of
plain MLM on two ranks under ZeRO-2, whose log says what they waited for.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from results import append_section
from steps import free_port
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from dga_scale.corpus.loading.batches import BatchStream
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.mixture import Mixture
from dga_scale.corpus.loading.order import SampleOrder
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "loader"
TEXT = {"packed": ("acl", "chunk"), "reviews": ("restaurant", "document")}
"""Corpus and packing. A review is a row of its own, most of them far shorter than 128 tokens."""
BATCH, STEPS = 32, 200
RUN_STEPS, WARM_UP = 14, 3
"""Steps of a run, and how many of them are not counted."""


def main() -> None:
    """Measure both; print them and keep them in RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = options.data / "models" / "minilm-l6-mlm"
    table = ["| text | loader | tokens/s | / BatchStream |", "|---" * 4 + "|"]
    waits = ["| text | seconds a step | waited for data | share | to prepare, share |", "|---" * 5 + "|"]
    shares = []
    for text, (name, packing) in TEXT.items():
        corpus = WORK / name
        raw = options.data / "corpora" / f"{name}.jsonl.gz"
        settings = ShardSettings(str(model), sequence_length=128, packing=packing)
        shard_corpus([str(raw)], corpus, settings, num_workers=2)
        rates = alone(corpus, model, options.rounds)
        for loader, values in rates.items():
            ratios = [a / b for a, b in zip(values, rates["BatchStream"], strict=True)]
            table.append(f"| {text} | {loader} | {statistics.median(values):,.0f} | {spread(ratios)} |")
        step, wait, tokens = waiting(model, corpus)
        shares.append(wait / step)
        # The thread that prepares batches shares the rank's core with the training.
        prepared = tokens / statistics.median(rates["BatchStream"])
        waits.append(f"| {text} | {step:.3f} | {wait:.5f} | {shares[-1]:.2%} | {prepared / step:.2%} |")
    met = "met" if max(shares) < 0.01 else "missed"
    body = [
        f"Batches of {BATCH} rows of at most 128 tokens, masks drawn, {options.rounds} rounds (range):\n",
        *table,
        f"\nPlain MLM of MiniLM, bf16, 2 ranks of {BATCH} rows, medians of {RUN_STEPS - WARM_UP} steps:\n",
        *waits,
        f"\nTarget: data wait under 1% of a step: {met}.",
    ]
    command = " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]])
    append_section("Speed of the loader, and data wait", "\n".join(body), command)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# --- alone ---


def alone(folder: Path, model: Path, rounds: int) -> dict[str, list[float]]:
    """Real tokens a second by loader, a figure a round."""
    corpus = Corpus.open(folder)
    order = SampleOrder(len(corpus), seed=0).indices(0, BATCH * STEPS)
    rows = [
        {"input_ids": ids.tolist(), "special_tokens_mask": special.tolist()}
        for ids in corpus.rows(order)
        for special in [np.isin(ids, corpus.manifest.all_special_ids).astype(int)]
    ]
    theirs = folder.with_name(f"{folder.name}-rows")
    shutil.rmtree(theirs, ignore_errors=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(theirs)
    collator = DataCollatorForLanguageModeling(load_tokenizer(model), mlm_probability=0.15)
    their_loader = partial(
        DataLoader, datasets.load_from_disk(str(theirs)), batch_size=BATCH, collate_fn=collator
    )
    our_loader = partial(
        BatchStream, Mixture([corpus], [], seed=0), MaskingPolicy.for_corpus(corpus, 0.15), rank=0,
        global_batch_size=BATCH, micro_batch_size=BATCH, world_size=1, start_step=0, num_steps=STEPS,
        pack=True,
    )  # fmt: skip
    loaders: dict[str, Callable[[], Iterable[Any]]] = {
        "BatchStream": our_loader,
        "DataLoader, in the process": partial(their_loader, num_workers=0),
        "DataLoader, a worker process": partial(their_loader, num_workers=1),
    }
    tokens = int(corpus.lengths[order[BATCH:]].sum())
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            batches = iter(loader())
            next(batches)  # threads and processes are started
            started = time.perf_counter()
            for _ in batches:
                pass
            rates[name].append(tokens / (time.perf_counter() - started))
    return rates


# --- in a run ---


def waiting(model: Path, corpus: Path) -> tuple[float, float, float]:
    """A short run: median seconds of a step, of its wait for data, and real tokens of a rank's part of it."""
    output = WORK / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 2]
    command += ["--master_port", free_port(), "launchers/dga_train.py", "--method", "mlm", "--ds_config",
                "ds_configs/zero2.json", "--model", model, "--corpus", corpus, "--output_dir", output,
                "--global_batch_size", 2 * BATCH, "--max_steps", RUN_STEPS, "--eval_steps", RUN_STEPS,
                "--save_steps", RUN_STEPS, "--max_eval_samples", 16]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"the run failed with {done.returncode}:\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "data_wait_seconds" in line][WARM_UP:]
    tokens = [line["tokens_per_second"] * line["step_seconds"] / 2 for line in steps]
    waits = [line["data_wait_seconds"] for line in steps]
    seconds = [line["step_seconds"] for line in steps]
    return statistics.median(seconds), statistics.median(waits), statistics.median(tokens)


if __name__ == "__main__":
    main()
