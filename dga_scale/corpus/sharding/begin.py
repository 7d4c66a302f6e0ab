"""Sharding begins: a plan, tried on the first documents and compared with what the folder holds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from dga_scale.corpus.reading.cleaning import clean
from dga_scale.corpus.reading.files import Source
from dga_scale.corpus.reading.overlap import load_overlap
from dga_scale.corpus.reading.sources import Records, read_segment
from dga_scale.corpus.sharding.packing import Layout, write_tokenizer_file
from dga_scale.corpus.sharding.staging import Plan, ShardSettings, Work, content_hash, read_plan
from dga_scale.corpus.shards import (
    MANIFEST,
    VALIDATION,
    WORK_FOLDER,
    Corpus,
    Manifest,
    ReadSource,
    read_manifest,
)
from dga_scale.corpus.tokenizer import (
    Encoder,
    check_unknown,
    encoder_spec,
    load_tokenizer,
    markers,
    positions_beside,
    special_ids,
    tokenizer_hash,
)
from dga_scale.errors import UserError, note
from dga_scale.storage.atomic import storage_errors, write_json
from dga_scale.storage.lock import LOCK_FILE
from dga_scale.storage.typed_json import build

_FIRST_CHARACTERS = 1 << 18
"""The characters of text that are read and tokenised before any work begins."""


def begin(
    inputs: Sequence[str],
    settings: ShardSettings,
    work: Work,
    finished: Path,
    own: Callable[[str], object],
) -> None:
    """Make the plan and write it, or check that it is the plan of the work that was begun here.

    Args:
        inputs: As for ``shard_corpus``.
        settings: As for ``shard_corpus``.
        work: The unfinished work.
        finished: The file that is there once all work is done.
        own: Called with the name of the work before the folder is looked into: refuses where another owns it.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    settings = replace(settings, tokenizer_hash=tokenizer_hash(tokenizer))
    if settings.exclude:
        settings = replace(settings, exclude_hash=load_overlap(settings.exclude).content_hash)
    layout = Layout.of(tokenizer, settings.tokenizer, settings.packing, settings.sequence_length)
    positions = positions_beside(settings.tokenizer)
    if positions is not None and settings.sequence_length > positions:
        raise UserError(
            f"--sequence_length {settings.sequence_length}: the model in {settings.tokenizer} has "
            f"{positions} positions. Give {positions} or less"
        )
    if settings.sequence_length > tokenizer.model_max_length:
        note(
            f"--sequence_length {settings.sequence_length} is above {tokenizer.model_max_length}, the "
            f"longest input that the tokenizer of {settings.tokenizer!r} states for its model"
        )
    plan = Plan.make(inputs, settings)
    output = work.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file. Choose a new folder")
    own(plan.name)
    if finished.exists():
        _check_same(output, plan, read_manifest(output))
        if _is_whole(output, settings):
            return
        with storage_errors(output):
            work.folder.mkdir(exist_ok=True)  # first: by it the folder is known to be ours
            finished.unlink(missing_ok=True)
            (output / VALIDATION / MANIFEST).unlink(missing_ok=True)
    begun = None
    if work.plan_file.exists():
        begun = read_plan(work.plan_file)
        if begun == plan:
            return
    elif not work.folder.exists() and output.exists() and _unknown_files(output):
        raise UserError(
            f"--output {output} is not empty and holds no corpus: {', '.join(_unknown_files(output)[:3])}. "
            "Choose a new folder"
        )
    spec = encoder_spec(tokenizer, settings.tokenizer)
    _try_first_documents(plan, spec, layout)
    if others := markers(tokenizer):
        done = "tokens" if tokenizer.is_fast else "written as text"
        note(
            f"{len(others)} special tokens of the tokenizer ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}) are {done} where they stand in the text; its "
            f"{', '.join(special_ids(tokenizer))} are written as text"
        )
    with storage_errors(output):
        work.folder.mkdir(parents=True, exist_ok=True)
        if begun is not None and not _same_work(begun, plan):
            kept = sum(work.input_split(key).exists() for key in plan.keys)
            note(
                f"{output} was begun with {'; '.join(_differences(begun, plan)) or 'other inputs'}: of "
                f"{len(plan.keys)} parts of the input {kept} need not be read again"
            )
            work.remove_later_stages()
            work.plan_file.unlink()  # before what it goes with is written: killed now, no plan is taken up
        write_tokenizer_file(work, spec, layout, special_ids(tokenizer))
        write_json(work.plan_file, plan.to_json(), work.scratch)


def _is_whole(output: Path, settings: ShardSettings) -> bool:
    """Return whether a finished corpus has all its shards as they were written; what has not is told."""
    try:
        for folder in [output, *([output / VALIDATION] if settings.validation_share else [])]:
            Corpus.open(folder, verify="sha256")
    except UserError as error:
        note(f"the corpus is made again: {error}")
        return False
    return True


def _try_first_documents(plan: Plan, spec: str, layout: Layout) -> None:
    """Read and tokenise the beginning of the inputs, so that what is wrong with all is told at once."""
    settings = plan.settings
    texts = (
        clean(text)
        for segment in plan.input_splits[0]
        for text in read_segment(plan.sources[segment.source], segment, settings.read_options, Records())
    )
    first, left = [], _FIRST_CHARACTERS
    for text in texts:
        first.append(text[:left])
        left -= len(first[-1])
        if left <= 0:
            break
    ids = np.concatenate([np.empty(0, np.int32), *Encoder(spec)(first)])
    unknown = int(np.count_nonzero(ids == layout.unknown))
    check_unknown(unknown, len(ids), settings.tokenizer, f"the first {len(first)} documents")


def _unknown_files(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.name not in (WORK_FOLDER, LOCK_FILE))


def _check_same(output: Path, plan: Plan, manifest: Manifest) -> None:
    """Refuse to give a finished corpus for other settings or inputs than its own."""
    try:
        held = replace(plan, settings=build(ShardSettings, manifest.settings, "settings"))
    except ValueError as error:
        raise UserError(
            f"damaged ({error}). Choose another --output, or remove the folder first", output / MANIFEST
        ) from error
    if differences := _differences(held, plan) + _other_inputs(manifest.sources, plan.sources):
        raise UserError(
            f"--output {output} holds another corpus: {'; '.join(differences)}. Choose another --output, or "
            "remove the folder first"
        )


def _differences(begun: Plan, plan: Plan) -> list[str]:
    """List the settings in which two plans differ."""
    before, now = asdict(begun.settings), asdict(plan.settings)
    # The same tokenizer and examples may lie elsewhere now; their hashes tell.
    names = [name for name in now if name not in ("tokenizer", "exclude")]
    return [f"{n} {before[n]!r}, now {now[n]!r}" for n in names if before[n] != now[n]]


def _same_work(begun: Plan, plan: Plan) -> bool:
    """Return whether the same text becomes the same corpus, wherever it lies."""
    return begun.keys == plan.keys and not _differences(begun, plan)


def _other_inputs(before: Sequence[ReadSource], now: Sequence[Source]) -> list[str]:
    """Name an input that is not among those that were read, or that is not any more, if there is one."""
    old = [(source.bytes, source.fingerprint) for source in before]
    new = [(source.bytes, source.fingerprint) for source in now]
    gone = [source.path for source, state in zip(before, old, strict=True) if state not in new]
    for source, state in zip(now, new, strict=True):
        if state not in old:
            changed = Path(source.path).name in [Path(path).name for path in gone]
            return [f"input {source.path} {'was changed' if changed else 'is new'}"]
    if gone:
        return [f"input {gone[0]} is missing"]
    if old != new:
        return ["the same inputs in another order or number"]
    return [
        f"input {source.path} was changed"
        for read, source in zip(before, now, strict=True)
        if read.modified != source.modified and read.sha256 != content_hash(source)
    ][:1]
