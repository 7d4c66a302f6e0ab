"""Every field of every file that a run or the sharder wrote, changed to what it can't be.

Checksums and hashes are made to fit what was changed, as by someone who means it: what is refused here is
refused by the field's own check.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_scale.checkpoint.state import STATE, TrainerState, read_state
from dga_scale.checkpoint.store import inspect, write_manifest
from dga_scale.config.parsing import read_config
from dga_scale.corpus.sharding import staging
from dga_scale.corpus.sharding.packing import Layout, TokenizerFile
from dga_scale.corpus.sharding.pipeline import ReadInputs
from dga_scale.corpus.shards import Corpus, ExcludedFile, ReadSource, Shard
from dga_scale.endtasks.seeds import _read as read_seed
from dga_scale.objectives.methods.cse import _read as read_experts
from dga_scale.report.report import _one_line, _outcome
from dga_scale.report.run_data import load_run, summarize_protection
from dga_scale.report.scores import load_scores
from dga_scale.run_folder import RunFolder
from dga_scale.storage.checked_json import CHECKSUM, with_checksum
from dga_scale.storage.safetensors_stream import record_of
from dga_scale.train.finish import read_summary
from dga_scale.train.resume import _stored_schedule
from dga_scale.train.schedule import Schedule
from tests.helpers.nonsense import JSON, NAMES, changed_at, fuzz, places, refusal, wrong_values
from tests.helpers.small import SmallWorld

SIGNED = ("modified", "unknown")
"""A time before 1970, and "no such token"."""


@dataclass(frozen=True)
class Case:
    """A file, how it is read, and what is right in it.

    Attributes:
        content: What is in it: an object, or a list.
        read: Writes a content, as bytes, and reads it back.
        unread: Beginnings of places whose value decides nothing: anything may stand there.
        names: Places that hold the name of a file.
        nullable: Fields that may be null.

    """

    content: Any
    read: Callable[[Any], Any]
    unread: tuple[tuple[Any, ...], ...] = ()
    names: tuple[tuple[Any, ...], ...] = ()
    nullable: tuple[str, ...] = ()

    def wrong(self) -> Iterator[Any]:
        """The content with one field changed to what it can't be, or left out."""
        for at, value in places(self.content):
            if not any(at[: len(free)] == free for free in self.unread):
                for wrong in wrong_values(value):
                    right = (wrong is None and at[-1] in self.nullable) or (wrong == -1 and at[-1] in SIGNED)
                    if not right and not _is_right(value, wrong):
                        yield changed_at(self.content, at, wrong)
        for at in self.names:
            for name in NAMES:
                yield changed_at(self.content, at, name)


def _is_right(value: Any, wrong: Any) -> bool:
    """Whether what is wrong elsewhere is right here: an empty list, or a whole number where one may stand."""
    if isinstance(value, float):
        return type(wrong) is int and abs(wrong) < 1e300
    return type(value) is type(wrong) and isinstance(value, list | dict)


def signed(content: Any) -> Any:
    """With the checksum that it would have."""
    if isinstance(content, dict) and CHECKSUM in content:
        try:
            return with_checksum({name: value for name, value in content.items() if name != CHECKSUM})
        except (ValueError, RecursionError):
            return content
    return content


def dumped(content: Any) -> bytes:
    return json.dumps(signed(content), default=str).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nonsense")


def file_case(path: Path, content: Any, read: Callable[[Path], Any], **more: Any) -> Case:
    def write_and_read(changed: Any) -> Any:
        path.write_bytes(dumped(changed))
        return read(path)

    return Case(content, write_and_read, **more)


def corpus_case(world: SmallWorld, folder: Path) -> Case:
    corpus = Path(shutil.copytree(world.corpus, folder / "corpus"))

    def read(path: Path) -> None:
        found = Corpus.open(path.parent, verify="sha256")
        found.lengths, found.rows([0, len(found) - 1])

    content = json.loads((corpus / "manifest.json").read_text())
    free = (
        ("settings",),
        ("sources",),
        ("documents_read",),
        ("dropped",),
        ("tokenizer",),
        ("tokenizer_hash",),
    )
    names = (("shards", 0, "file"),)
    return file_case(corpus / "manifest.json", content, read, unread=(*free[:1], (CHECKSUM,)), names=names)


def checkpoint_case(folder: Path) -> Case:
    path = folder / "step-000003"
    path.mkdir()
    (path / "a.txt").write_text("a")
    write_manifest(path, {"a.txt": record_of(path / "a.txt")}, 3, 1, {"b.txt": record_of(path / "a.txt")})

    def read(changed: Any) -> None:
        (path / "manifest.json").write_bytes(dumped(changed))
        found, problem = inspect(path)
        if found is None:
            raise refused(problem)

    content = json.loads((path / "manifest.json").read_text())
    return Case(content, read, unread=((CHECKSUM,),))


def refused(problem: str) -> Exception:
    from dga_scale.errors import UserError

    return UserError(problem)


SCHEDULE = Schedule("linear", 1e-4, 0.0, 0, 10, 1, 2)
EVALUATION = {"domain_loss": 3.1, "texts": {"domain": {"content_hash": "9f", "rows": 20}}}
RECORDS = [
    {"event": "evaluation", "step": 0, **EVALUATION},
    {"step": 1, "loss/total": 3.5, "learning_rate": 1e-4, "memory_gib": [0.5], "step_seconds": 0.1},
    {"event": "protection", "step": 1, "kind": "heads", "protected_units": 3, "target_protection": 0.9,
     "measured_protection": 0.8, "one_minus_a": [[0.5, 0.1]], "movement": [[0.5, 0.2]]},
    {"event": "evaluation", "step": 2, **EVALUATION},
]  # fmt: skip
RANGE = {"mean": 3.0, "low": 2.5, "high": 3.5, "count": 3}
ENTRY = {
    "kind": "domain", "over": "batches", "perplexity": 20.0, "loss": RANGE,
    "difference": {**RANGE, "p_t": 0.1, "p_sign_flip": 0.2},
}  # fmt: skip
RESULTS = {
    "format": 1,
    "base": "b",
    "models": {
        name: {"corpora": {"acl": ENTRY}, "tasks": {}, "domain_loss": {"values": [3.0]}}
        for name in ("base", "m")
    },
    "overlap": {"t": {"examples": 3, "found": 1, "excluded_from": ["acl"]}},
    "notes": ["a note"],
}
RECORD = {"bytes": 3, "sha256": "ab"}
SUMMARY = {
    "method": "dga", "corpus": "acl", "steps": 2, "tokens": 30, "texts": EVALUATION["texts"],
    "model_files": {"model.safetensors": RECORD}, "domain_loss": {"before": 3.0, "after": 2.0},
}  # fmt: skip
EXPERTS = {"alpha": 0.5, "projection": 8, "sublayers": [{"layer": 0, "sublayer": "ffn", "experts": 2}]}
SOURCE = staging.Source("a.txt", "text", "gzip", 10, "f", 5)
BATCH = staging.DocumentBatch("b-0000", 3, 30, 5)


def run_cases(folder: Path) -> dict[str, Case]:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text("method: dga\nmodel: m\ncorpus: [c]\nimportance_squash: clip\n")
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))

    def log(changed: Any) -> None:
        lines = (
            [json.dumps(record, default=str) for record in changed] if isinstance(changed, list) else ["3"]
        )
        (folder / "logged").mkdir(exist_ok=True)
        (folder / "logged" / "config.yaml").write_text("method: dga\n")
        (folder / "logged" / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
        run = load_run(folder / "logged")
        (
            _outcome([run]),
            _one_line(run),
            summarize_protection(run),
            run.effective_protection(),
            run.peak_memory(),
        )

    def state(path: Path) -> None:
        checkpoint, problem = inspect(path.parent)
        assert checkpoint is not None, problem
        _stored_schedule(read_state(checkpoint).schedule, path.parent)

    checkpoint = folder / "step-000004"
    checkpoint.mkdir()
    plain = asdict(TrainerState(4, "c", 0, {"cur_scale": 2.0}, "b", ["p"], asdict(SCHEDULE), EVALUATION))

    def read_checked_state(changed: Any) -> None:
        (checkpoint / STATE).write_bytes(dumped(changed))
        write_manifest(checkpoint, {STATE: record_of(checkpoint / STATE)}, 4, 1)
        state(checkpoint / STATE)

    return {
        "log.jsonl": Case(RECORDS, log, unread=((1, "memory_gib"),), nullable=NUMBERS),
        "trainer_state.json": Case(plain, read_checked_state, nullable=("domain_loss",)),
        "summary.json": file_case(
            run / "summary.json",
            SUMMARY,
            lambda path: (read_summary(RunFolder(run)), load_run(run)),
            nullable=NULL,
        ),
        "corpora.json": file_case(
            run / "corpora.json",
            {"c": "hash"},
            lambda path: RunFolder(run)._differences(CONFIG),
            nullable=("c",),
        ),
        "experts.json": file_case(
            run / "experts.json",
            with_checksum({"settings": EXPERTS, "clusters": []}),
            read_experts,
            unread=((CHECKSUM,), ("clusters",)),
        ),
        "environment.json": file_case(run / "environment.json", {}, lambda path: load_run(run)),
        "results.json": file_case(
            folder / "results.json", RESULTS, lambda path: load_scores(path.parent), nullable=NULL
        ),
        "seed-1.json": file_case(
            folder / "seed-1.json",
            {"identity": {"model": "m"}, "scores": {"macro_f1": 0.5}},
            read_seed,
            unread=(("identity", "model"),),
        ),
    }


NUMBERS = ("loss/total", "learning_rate", "step_seconds", "domain_loss", "one_minus_a", "movement", 0, 1)
NULL = (
    "low",
    "high",
    "difference",
    "perplexity",
    "found",
    "before",
    "p_t",
    "p_sign_flip",
    "compression",
    "stop",
)
CONFIG = read_config(["--ds_config", "a.json", "--model", "m", "--corpus", "c"])


def sharding_cases(folder: Path) -> dict[str, Case]:
    layout = Layout("chunk", 8, (2,), (3,), 3, False, (0, 2, 3), 1, 40)
    report = staging.InputSplitReport(3, 0, 0, 0, 0, 0)
    source = ReadSource(**asdict(SOURCE), sha256="x")
    contents: dict[str, Any] = {
        "plan.json": staging.Plan(
            staging.ShardSettings("t", exclude=("e",)), (SOURCE,), ((staging.Segment(0, 0, 9, 9),),)
        ),
        "tokenizer.json": TokenizerFile("{}", layout, {"pad": 0}),
        "input.json": staging.InputSplitResult(report, [BATCH], [3], "first", ["x"]),
        "report.json": ReadInputs(report, [ExcludedFile("e", "x", 3, 1)], [source]),
        "train-00000.json": Shard("data-00000.arrow", 3, 3, 30, 20, 0, 100, "x"),
    }
    cases = {
        name: file_case(
            folder / name,
            json.loads(json.dumps(asdict(value))),
            partial(staging.read_work, kind=type(value)),
            nullable=NULL,
        )
        for name, value in contents.items()
    }
    cases["document_batches.json"] = file_case(
        folder / "document_batches.json", [asdict(BATCH)], staging.load_document_batches.__wrapped__
    )
    return cases


@pytest.fixture(scope="module")
def cases(world: SmallWorld, folder: Path) -> dict[str, Case]:
    return {
        "manifest.json of a corpus": corpus_case(world, folder),
        "manifest.json of a checkpoint": checkpoint_case(folder),
        **run_cases(folder),
        **sharding_cases(folder),
    }


def test_right_files_are_read(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        assert refusal(lambda case=case: case.read(case.content)) is None, name


def test_a_wrong_field_is_refused(cases: dict[str, Case]) -> None:
    tried = 0
    for name, case in cases.items():
        for changed in case.wrong():
            line = refusal(lambda case=case, changed=changed: case.read(changed))
            assert line is not None, (name, changed)
            tried += 1
    assert tried > 1000


@fuzz(300)
@given(data=st.data())
def test_any_json_in_any_place(cases: dict[str, Case], data: st.DataObject) -> None:
    """It may be right there, so it may be accepted; what is not is refused in one line."""
    case = cases[data.draw(st.sampled_from(sorted(cases)))]
    found = [at for at, _ in places(case.content)]
    if found:
        at = data.draw(st.sampled_from(found))
        changed = changed_at(case.content, at, data.draw(JSON | st.just(...)))
        refusal(lambda: case.read(changed))


BROKEN = (
    b"",
    b"{",
    b"[]",
    b"3",
    b"null",
    b"\xff",
    b'{"a": ' * 3000,
    b"[" * 10**5,
    b'{"format": ' + b"9" * 5000 + b"}",
)


def test_files_that_are_no_such_json(cases: dict[str, Case], folder: Path) -> None:
    for path in sorted(folder.rglob("*.json*")):
        if path.name in ("state.json", "dataset_info.json"):
            continue
        kept = path.read_bytes()
        for content in BROKEN:
            path.write_bytes(content)
            for read in READERS.get(path.name, ()):
                assert refusal(lambda read=read, path=path: read(path)), (path, content[:20])
        path.write_bytes(kept)


READERS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "summary.json": (lambda path: read_summary(RunFolder(path.parent)), lambda path: load_run(path.parent)),
    "experts.json": (read_experts,),
    "results.json": (lambda path: load_scores(path.parent),),
    "seed-1.json": (read_seed,),
    "plan.json": (staging.read_plan,),
    "corpora.json": (lambda path: RunFolder(path.parent)._differences(CONFIG),),
}
