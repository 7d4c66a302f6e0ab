"""The command line of the sharder: ``dga-shard``, ``tools/shard_corpus.py``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dga_scale.corpus.options import build_parser
from dga_scale.corpus.sharding.executor import under_mpi
from dga_scale.corpus.sharding.pipeline import UNKNOWN_WARNED, ShardReport, shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import VALIDATION
from dga_scale.errors import run_main


def shard_command() -> NoReturn:
    """Entry point of ``dga-shard``."""
    run_main(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Shard text as given in ``arguments`` (None: the command line), and print a summary."""
    return build_parser().run(_shard, arguments)


def _shard(given: argparse.Namespace) -> int:
    options = dict(vars(given))
    inputs, output = options.pop("inputs"), options.pop("output")
    options["exclude"] = tuple(options.get("exclude", ()))
    run = {name: options.pop(name) for name in ("num_workers", "array_task", "array_task_patience")}
    report = shard_corpus(inputs, output, ShardSettings(**options), **run)
    if not (under_mpi() and report.index):
        print(summary(output, report))
        if report.train.unknown > UNKNOWN_WARNED * report.train.tokens:
            print(
                f"warning: {report.train.unknown / report.train.tokens:.0%} of the tokens are unknown to the "
                f"tokenizer of {report.train.tokenizer!r}: what they stand for is lost. A model whose "
                "vocabulary was made for this script or language would see it",
                file=sys.stderr,
            )
    return 0


def summary(output: Path, report: ShardReport) -> str:
    """Describe the content of the corpus for people."""
    train, held_out = report.train, report.validation
    unknown = train.unknown / train.tokens
    dropped = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in train.dropped.items())
    lines = [
        f"corpus {output}" + ("" if report.text_bytes else " was complete already"),
        f"  documents  {train.documents_read:,} read, {train.documents:,} to train on; dropped: {dropped}",
        f"  rows       {train.rows:,} of up to {train.sequence_length} tokens, {train.packing} packing",
        f"  tokens     {train.tokens:,} in {len(train.shards)} shards, {unknown:.1%} of them unknown",
    ]
    lines += [
        f"  excluded   {file.path}: {file.found:,} of {file.examples:,} examples "
        f"({file.found / max(1, file.examples):.1%}) stood in the text"
        for file in train.excluded
    ]
    if held_out is not None:
        lines.append(
            f"  held out   {held_out.documents:,} documents, {held_out.rows:,} rows, {held_out.tokens:,} "
            f"tokens in {output / VALIDATION}"
        )
    if report.text_bytes:
        rate = f"{report.text_bytes / 1e6 / report.seconds:.2f} MB/s"
        lines.append(
            f"  time       {report.seconds:.1f} s for {report.text_bytes / 1e6:.1f} MB of text"
            + (" (some of it by earlier or other runs)" if report.resumed else f", {rate}")
        )
    return "\n".join(lines)
