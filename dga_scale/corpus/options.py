"""The options of ``dga-shard``."""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from dga_scale.config.arguments import Count, Parser, PathText, whole_number
from dga_scale.corpus.reading.files import COMPRESSIONS
from dga_scale.corpus.reading.sources import FORMATS
from dga_scale.corpus.sharding.executor import under_mpi
from dga_scale.corpus.sharding.packing import PACKINGS
from dga_scale.corpus.sharding.pipeline import DOCUMENT_MODES, ON_BAD_RECORD
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.corpus.shards import VALIDATION


def build_parser() -> Parser:
    """Build the parser of the command's options."""
    parser = Parser(
        description="Tokenise raw text into a corpus folder: Arrow shards and a manifest. A run that was "
        "interrupted resumes when the same command is given again; the result is the same, byte for byte, "
        "for any number of workers, mpirun ranks or array tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = {field.name: field.default for field in fields(ShardSettings)}
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        type=PathText,
        metavar="INPUT",
        help=f"files, folders or globs: {', '.join(FORMATS)} (text also as {' or '.join(COMPRESSIONS)}), "
        "folders saved by `datasets`, or any other file that datasets.load_dataset reads",
    )
    add("--tokenizer", required=True, default=argparse.SUPPRESS, type=PathText,
        help="folder or name of the model to train")  # fmt: skip
    add("--output", required=True, default=argparse.SUPPRESS, type=Path, help="the corpus folder to write")
    add(
        "--sequence_length",
        type=int,
        default=defaults["sequence_length"],
        help="longest row, in tokens, special ones included; 164 is DGA's",
    )
    add(
        "--packing",
        choices=PACKINGS,
        default=defaults["packing"],
        help="chunk: documents concatenated and cut (the papers'); document: a row is one document or a "
        "window of it",
    )
    add("--text_field", default=defaults["text_field"], help="field or column that holds the text")
    add(
        "--document",
        choices=DOCUMENT_MODES,
        default=defaults["document"],
        help="what a document is in a txt file: a line, or the whole file",
    )
    add(
        "--validation_share",
        type=float,
        default=defaults["validation_share"],
        help=f"share of the documents held out, chosen by their hash, in OUTPUT/{VALIDATION}; at least one "
        "document unless 0",
    )
    add(
        "--keep_duplicates",
        action="store_true",
        help="keep documents whose cleaned text repeats an earlier one",
    )
    add(
        "--exclude",
        nargs="+",
        type=PathText,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="end-task files (JSON lines with text, perhaps text_pair): documents that share eight words in "
        "a row with an example are dropped; says how many examples were found",
    )
    add(
        "--on_bad_record",
        choices=ON_BAD_RECORD,
        default=defaults["on_bad_record"],
        help="what a record does that can't be read (no JSON, no such field, no UTF-8): stop, or skip: it is "
        "left out and counted in the summary and the manifest",
    )
    add(
        "--max_document_mb",
        type=float,
        default=defaults["max_document_mb"],
        help="largest size of a document, in megabytes; a larger one is a bad record",
    )
    add(
        "--shard_size",
        type=float,
        default=defaults["shard_size"],
        help="megabytes of text in a shard; also decides how finely the work is shared",
    )
    add("--seed", type=int, default=defaults["seed"], help="another seed holds out other documents")
    add(
        "--num_workers",
        action=Count,
        default=1 if under_mpi() else len(os.sched_getaffinity(0)),
        help="cores to use, of each rank or array task; the default is all, 1 under mpirun",
    )
    add(
        "--array_task",
        type=_array_task,
        metavar="i/N",
        help="do the i-th of N shares (from 0), in a job array whose tasks see one file system; the task "
        "that comes last writes the manifest",
    )
    add(
        "--array_task_patience",
        type=float,
        default=60.0,
        help="seconds without any progress after which an array task does the shares of the others too",
    )
    return parser


def _array_task(text: str) -> tuple[int, int]:
    index, _, size = text.partition("/")
    try:
        return whole_number(index), whole_number(size)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not of the form i/N, for example 0/8") from None
