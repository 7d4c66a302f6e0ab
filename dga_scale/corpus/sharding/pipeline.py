"""The sharder: raw text in, a corpus folder out.

    plan -> read (input splits of the input) -> find duplicates -> write shards -> manifest

Every step leaves files that are complete or absent, so a run that was killed resumes where it stopped, and
the bytes do not depend on who did what.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dga_scale.corpus.reading.overlap import load_overlap
from dga_scale.corpus.sharding.begin import begin
from dga_scale.corpus.sharding.executor import ArrayTaskExecutor, Executor, MpiExecutor, Stage, under_mpi
from dga_scale.corpus.sharding.packing import (
    PACKINGS,
    ShardTask,
    features,
    load_tokenizer_file,
    write_shard,
)
from dga_scale.corpus.sharding.staging import (
    DocumentBatch,
    InputSplitReport,
    InputSplitResult,
    Plan,
    ShardSettings,
    Work,
    content_hash,
    find_duplicates,
    load_document_batches,
    load_plan,
    number_of_partitions,
    read_input_split,
    read_work,
)
from dga_scale.corpus.shards import (
    FORMAT,
    MANIFEST,
    VALIDATION,
    WORK_FOLDER,
    ExcludedFile,
    Manifest,
    ReadSource,
    Shard,
    read_manifest,
)
from dga_scale.corpus.tokenizer import (
    check_unknown,
)
from dga_scale.errors import UserError, note
from dga_scale.storage.atomic import storage_errors, write_json
from dga_scale.storage.checked_json import with_checksum
from dga_scale.storage.lock import owned

DOCUMENT_MODES = ("line", "file")
ON_BAD_RECORD = ("stop", "skip")

UNKNOWN_WARNED = 0.05
"""The share of unknown tokens from which a corpus is made with a warning."""


@dataclass(frozen=True)
class ShardReport:
    """The result of a call of ``shard_corpus``."""

    train: Manifest
    validation: Manifest | None
    """The manifest of the held-out split; None where ``validation_share`` is 0."""
    text_bytes: int
    """The bytes of cleaned text that were sharded; 0 where the corpus was complete already."""
    seconds: float
    resumed: bool
    """Whether another call had done part of the work, or is doing it."""
    index: int
    """The rank or array task of this call."""


@dataclass(frozen=True)
class ReadInputs:
    """What the manifest says of the inputs, which is known when all have been read."""

    report: InputSplitReport
    excluded: list[ExcludedFile]
    sources: list[ReadSource]


def shard_corpus(
    inputs: Sequence[str],
    output: Path,
    settings: ShardSettings,
    *,
    num_workers: int = 1,
    array_task: tuple[int, int] | None = None,
    array_task_patience: float = 60.0,
) -> ShardReport:
    """Tokenise text into a corpus folder, which ``Corpus.open`` reads.

    Started under ``mpirun``, the ranks share the work. The result is the same, byte for byte, for any number
    of workers, ranks and parts, and after any number of interruptions.

    Args:
        inputs: Files, folders and globs.
        output: The corpus folder: new, empty, or of an earlier call with the same inputs and settings.
        settings: What decides the bytes; ``tokenizer_hash`` and ``exclude_hash`` are filled in here.
        num_workers: Cores to use (of each rank or array task).
        part: (i, N): do the i-th of N shares, counted from 0; for job arrays.
        array_task_patience: Seconds without any progress after which an array task does the others' shares.

    Raises:
        UserError: Any input, setting or folder that can't be used, or a full disk; or another process writes
            ``output`` and is no array task of the same work.
    """
    started = time.monotonic()
    for cached in (load_plan, load_document_batches, load_tokenizer_file, load_overlap):
        cached.cache_clear()  # another call may have used the same folder for another corpus
    _check_settings(settings, num_workers, array_task)
    work = Work(output / WORK_FOLDER)
    finished = output / MANIFEST
    executor = _executor(num_workers, output, array_task, array_task_patience, work)
    with ExitStack() as held, executor:

        def own(work_name: str) -> None:
            # Array tasks share what they all do; between other processes nobody says who does what.
            held.enter_context(owned(output, group=work_name if array_task else ""))

        resumed = work.plan_file.exists() or finished.exists()
        executor.on_first(lambda: begin(inputs, settings, work, finished, own))
        text_bytes = 0
        try:
            if not finished.exists():
                text_bytes = _complete(work, executor, finished)
        except FileNotFoundError:
            # Another array task did this one's work as well, ended, and removed the folder under our hands.
            if not finished.exists():
                raise
        executor.on_first(lambda: shutil.rmtree(work.folder, ignore_errors=True))
    validation = output / VALIDATION
    return ShardReport(
        train=read_manifest(output),
        validation=read_manifest(validation) if settings.validation_share else None,
        text_bytes=text_bytes,
        seconds=time.monotonic() - started,
        resumed=resumed,
        index=executor.index,
    )


def _check_settings(settings: ShardSettings, num_workers: int, array_task: tuple[int, int] | None) -> None:
    rules: list[tuple[bool, str]] = [
        (settings.sequence_length >= 8, f"--sequence_length {settings.sequence_length}: must be at least 8"),
        (settings.packing in PACKINGS, f"--packing {settings.packing}: must be one of {', '.join(PACKINGS)}"),
        (
            settings.document in DOCUMENT_MODES,
            f"--document {settings.document}: must be one of {', '.join(DOCUMENT_MODES)}",
        ),
        (
            0 <= settings.validation_share < 1,
            f"--validation_share {settings.validation_share}: must be from 0 to below 1",
        ),
        (settings.shard_size > 0, f"--shard_size {settings.shard_size}: must be above 0"),
        (settings.seed >= 0, f"--seed {settings.seed}: must be 0 or more"),
        (
            settings.on_bad_record in ON_BAD_RECORD,
            f"--on_bad_record {settings.on_bad_record}: must be one of {', '.join(ON_BAD_RECORD)}",
        ),
        (settings.max_document_mb > 0, f"--max_document_mb {settings.max_document_mb}: must be above 0"),
        (num_workers >= 1, f"--num_workers {num_workers}: must be at least 1"),
    ]
    if array_task is not None:
        rules.append(
            (
                0 <= array_task[0] < array_task[1],
                f"--array_task {array_task[0]}/{array_task[1]}: count from 0 to N - 1",
            )
        )
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def _executor(
    num_workers: int, output: Path, array_task: tuple[int, int] | None, patience: float, work: Work
) -> Executor:
    if under_mpi():
        if array_task is not None:
            raise UserError("--array_task under mpirun: the ranks share the work by themselves. Leave it out")
        return MpiExecutor(num_workers, output)
    if array_task is not None:
        return ArrayTaskExecutor(num_workers, output, *array_task, patience, work.scratch)
    return Executor(num_workers, output)


# --- the work ---


def _complete(work: Work, executor: Executor, finished: Path) -> int:
    """Do all work of the plan, and return the bytes of cleaned text."""
    plan = load_plan(work.plan_file)
    numbers = range(len(plan.input_splits))
    calls = [partial(read_input_split, work.folder, number) for number in numbers]
    executor.run(Stage("reading", calls, [work.input_split(key) for key in plan.keys], finished))
    executor.on_first(lambda: _gather_document_batches(work, plan))
    document_batches = load_document_batches(work.document_batches_file)

    partitions = 0
    if not plan.settings.keep_duplicates:
        partitions = number_of_partitions(document_batches)
        numbers = range(partitions)
        calls = [partial(find_duplicates, work.folder, number, partitions) for number in numbers]
        executor.run(Stage("finding duplicates", calls, [work.duplicates(n) for n in numbers], finished))

    tasks = shard_tasks(document_batches, plan.settings, partitions)
    calls = [partial(write_shard, work.folder, task, executor.threads(len(tasks))) for task in tasks]
    markers = [work.shard(task.split, task.number) for task in tasks]
    executor.run(Stage("tokenising", calls, markers, finished))
    executor.on_first(lambda: _assemble(work, plan, document_batches, tasks))
    return sum(document_batch.bytes for document_batch in document_batches)


def _gather_document_batches(work: Work, plan: Plan) -> None:
    """Write the list of all document batches, in the order of the input."""
    report, document_batches, first_bad = InputSplitReport(), [], ""
    found: set[int] = set()
    hashes: dict[int, str] = {}
    for key, input_split in zip(plan.keys, plan.input_splits, strict=True):
        result = read_work(work.input_split(key), InputSplitResult)
        document_batches += result.document_batches
        found.update(result.examples_found)
        first_bad = first_bad or result.first_bad
        begun = [segment.source for segment in input_split if not segment.start]
        hashes.update(zip(begun, result.sha256, strict=False))
        for name, value in asdict(result.report).items():
            setattr(report, name, getattr(report, name) + value)
    if first_bad:
        note(f"{report.bad:,} bad records were left out. The first: {first_bad}")
    if not document_batches:
        raise UserError(
            f"no document with text in the inputs: {report.documents_read} read, {report.empty} of them "
            f"empty, {report.control_only} of control characters only, {report.excluded} excluded, "
            f"{report.bad} bad"
        )
    overlap = load_overlap(plan.settings.exclude)
    excluded = [
        ExcludedFile(**asdict(file), found=count)
        for file, count in zip(overlap.files, overlap.counts(found), strict=True)
    ]
    with storage_errors(work.output):
        sources = [
            # A source without any row is in no input split.
            ReadSource(**asdict(source), sha256=hashes.get(number) or content_hash(source))
            for number, source in enumerate(plan.sources)
        ]
        contents = ReadInputs(report, excluded, sources)
        write_json(work.report_file, asdict(contents), work.scratch)
        write_json(work.document_batches_file, [asdict(each) for each in document_batches], work.scratch)


def shard_tasks(
    document_batches: Sequence[DocumentBatch], settings: ShardSettings, partitions: int
) -> list[ShardTask]:
    """List the shards to write: neighbouring document batches up to a shard's size; the held-out ones, which
    are slow, come first."""
    share = settings.validation_share
    threshold = int(share * 2**64)
    lowest = min(document_batch.lowest for document_batch in document_batches)
    if share and lowest >= threshold:
        # None of so few documents fell below: hold out the lowest, so that an evaluation corpus exists.
        threshold = lowest + 1
    tasks = []
    for split, part in ((VALIDATION, share), ("train", 1.0)):
        first, size = 0, 0.0
        groups = []
        for index, document_batch in enumerate(document_batches):
            size += document_batch.bytes * part
            if size >= settings.shard_bytes or index + 1 == len(document_batches):
                groups.append((first, index + 1))
                first, size = index + 1, 0.0
        if part:
            tasks += [
                ShardTask(split, number, group, threshold, partitions) for number, group in enumerate(groups)
            ]
    return tasks


# --- the manifest ---


def _assemble(
    work: Work, plan: Plan, document_batches: Sequence[DocumentBatch], tasks: Sequence[ShardTask]
) -> None:
    """Write both manifests, the training corpus's last: with it the folder is a corpus."""
    inputs = read_work(work.report_file, ReadInputs)
    report = inputs.report
    shards = {
        split: tuple(_finished_shard(work, task) for task in tasks if task.split == split)
        for split in (VALIDATION, "train")
    }
    kept = sum(shard.documents for part in shards.values() for shard in part)
    dropped = {
        "empty": report.empty,
        "control_only": report.control_only,
        "duplicates": report.duplicates
        + sum(document_batch.documents for document_batch in document_batches)
        - kept,
    }
    if plan.settings.exclude:
        dropped["excluded"] = report.excluded
    if report.bad:
        dropped["bad"] = report.bad
    if not sum(shard.rows for shard in shards["train"]):
        raise UserError(
            f"nothing is left to train on: {report.documents_read} documents read, dropped {dropped}, "
            f"{sum(shard.documents for shard in shards[VALIDATION])} held out. Give more text, or a smaller "
            "--validation_share (0: hold out nothing)"
        )
    _, layout, special = load_tokenizer_file(work.tokenizer_file)
    every = [shard for part in shards.values() for shard in part]
    check_unknown(
        sum(shard.unknown for shard in every),
        sum(shard.tokens for shard in every),
        plan.settings.tokenizer,
        "the text",
    )
    for split, records in shards.items():
        if not records:
            continue
        manifest = Manifest(
            format=FORMAT,
            split=split,
            sequence_length=layout.sequence_length,
            packing=layout.packing,
            causal=layout.causal,
            tokenizer=plan.settings.tokenizer,
            tokenizer_hash=plan.settings.tokenizer_hash,
            vocab_size=layout.vocab_size,
            special_ids=special,
            all_special_ids=layout.special_ids,
            rows=sum(shard.rows for shard in records),
            documents=sum(shard.documents for shard in records),
            tokens=sum(shard.tokens for shard in records),
            maskable=sum(shard.maskable for shard in records),
            unknown=sum(shard.unknown for shard in records),
            documents_read=report.documents_read,
            dropped=dropped,
            settings=asdict(plan.settings),
            sources=tuple(inputs.sources),
            shards=records,
            excluded=tuple(inputs.excluded),
        )
        with storage_errors(work.output):
            _write_manifest(work.shard_data(split, 0).parent, manifest, work.scratch)


def _finished_shard(work: Work, task: ShardTask) -> Shard:
    return read_work(work.shard(task.split, task.number), Shard)


def _write_manifest(folder: Path, manifest: Manifest, scratch: Path) -> None:
    """The manifest, after the two files with which ``datasets.load_from_disk`` opens the folder too."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file} for shard in manifest.shards],
        "_fingerprint": manifest.content_hash[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": manifest.split,
    }
    write_json(folder / "state.json", state, scratch)
    info = {"features": features(manifest.vocab_size)}
    write_json(folder / "dataset_info.json", info, scratch)
    write_json(folder / MANIFEST, with_checksum(manifest.to_json()), scratch)
