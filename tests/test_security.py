"""No file that we read can run code, none that we write is open to everybody or holds a secret.

Each file is replaced in turn by something that makes a folder, the canary, when it is unpickled, executed or
built as a YAML object. ``test_the_payloads_are_live`` shows that they do when they are read carelessly.
"""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from dga_scale.backbone.loading import load_model
from dga_scale.backbone.warmup import load_head, save_head
from dga_scale.checkpoint.export import consolidate
from dga_scale.checkpoint.fisher import load_fisher, save_fisher
from dga_scale.config.parsing import read_config
from dga_scale.corpus.cli import main as shard
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment, segments
from dga_scale.corpus.shards import Corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.endtasks.datasets_tasks import exported
from dga_scale.endtasks.finetune import load_classifier
from dga_scale.endtasks.suite import load_suite
from dga_scale.endtasks.tasks import load_task
from dga_scale.errors import UserError, run_main
from dga_scale.launch.world import single_process
from dga_scale.merging.folders import ModelFolder
from dga_scale.objectives.methods.cse import _read as read_experts
from dga_scale.planning.gpus import find_gpu
from dga_scale.preservation.fragments import Fragment
from dga_scale.preservation.importance import Importance
from dga_scale.preservation.weight_regularisation import key_of
from dga_scale.report.report import write_report
from dga_scale.storage.checked_json import checked, with_checksum
from dga_scale.storage.safetensors_stream import record_of
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.small import SmallWorld
from tests.test_train import arguments, run_training

SOURCES = [p for folder in ("dga_scale", "launchers", "tools") for p in (REPOSITORY / folder).rglob("*.py")]
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def torch_file(canary: Path, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Payload(canary)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def numpy_file(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def arrow_file(canary: Path) -> bytes:
    """A column of the extension type whose metadata pyarrow before 14.0.1 unpickled (CVE-2023-47248)."""
    hidden = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    hidden |= {b"ARROW:extension:metadata": pickle.dumps(Payload(canary))}
    ids = pa.list_(pa.int32())
    schema = pa.schema(
        [pa.field("input_ids", ids, metadata=hidden), ("length", pa.int32()), ("maskable", pa.int32())]
    )
    table = pa.table([pa.array([[1, 2]], ids), pa.array([2], pa.int32()), pa.array([2], pa.int32())], schema)
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def yaml_file(canary: Path) -> bytes:
    return f"seed: !!python/object/apply:os.mkdir ['{canary}']\n".encode()


def code_file(canary: Path) -> bytes:
    return f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n".encode()


def payloads(name: str, canary: Path) -> list[bytes]:
    """What to put in the place of a file of this name."""
    everywhere = [pickle.dumps(Payload(canary)), torch_file(canary), torch_file(canary, zipped=False)]
    own: dict[str, Callable[[Path], bytes]] = {
        ".arrow": arrow_file, ".yaml": yaml_file, ".json": yaml_file, ".npy": numpy_file
    }  # fmt: skip
    return everywhere + [own[suffix](canary) for suffix in own if name.endswith(suffix)]


@contextlib.contextmanager
def planted(path: Path, content: bytes) -> Iterator[None]:
    """``content`` in the place of a file, which comes back at the end."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


def read_in_vain(read: Callable[[], Any]) -> None:
    """Read; that may succeed, where the file was not needed, or be refused as a user's mistake."""
    with contextlib.suppress(UserError):
        read()


def refuses_all(folder: Path, canary: Path, read: Callable[[], Any]) -> None:
    """Replace each file of ``folder`` by each payload and read."""
    read()  # sound before
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    for file in files:
        for content in payloads(file.name, canary):
            with planted(file, content):
                read_in_vain(read)
            assert not canary.exists(), f"{file} ran code"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def finished(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, ended."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    flags = arguments(world, run, method="mlm", max_steps=1, max_eval_samples=4, general_eval_corpus=None)
    assert run_ranks(1, run_training, flags) == [0]
    return run


def test_nothing_of_ours_can_run_what_it_reads() -> None:
    """No pickle, no eval, no shell, no YAML objects, no code of models; torch.load nowhere."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            said = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
            if (
                {name.partition(".")[0] for name in imported} & EXECUTING
                or called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load")
                or called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle")
                or "True" in (said.get("shell"), said.get("allow_pickle"))
                or said.get("weights_only") == "False"
                or said.get("trust_remote_code", "False") != "False"
                or (called.endswith(".from_pretrained") and "trust_remote_code" not in said)
            ):
                found.append(f"{path}:{getattr(node, 'lineno', 0)}")
    assert not found


def test_the_payloads_are_live(canary: Path, tmp_path: Path) -> None:
    readers: list[Callable[[], Any]] = [
        lambda: pickle.loads(pickle.dumps(Payload(canary))),
        lambda: torch.load(io.BytesIO(torch_file(canary)), weights_only=False),
        lambda: torch.load(io.BytesIO(torch_file(canary, zipped=False)), weights_only=False),
        lambda: np.load(io.BytesIO(numpy_file(canary)), allow_pickle=True),
        lambda: yaml.unsafe_load(yaml_file(canary)),
        lambda: exec(code_file(canary)),
        lambda: pickle.loads(
            pa.ipc.open_stream(arrow_file(canary)).schema.field(0).metadata[b"ARROW:extension:metadata"]
        ),
    ]
    for read in readers:
        read()
        canary.rmdir()


def test_checkpoints(finished: Path, canary: Path, tmp_path: Path) -> None:
    """The manifest is made to fit what was planted, as one who plants it would do."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (folder,) = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    manifest = folder / "manifest.json"
    sound = manifest.read_bytes()

    def read() -> None:
        content = checked(json.loads(sound))
        for name in content["files"]:
            content["files"][name] = vars(record_of(folder / name))
        fitting = json.dumps(with_checksum(content)).encode()
        untouched = manifest.read_bytes() == sound
        with planted(manifest, fitting) if untouched else contextlib.nullcontext():
            with contextlib.suppress(Exception):  # a forged manifest is beyond what we say nicely
                consolidate(run, None, tmp_path / "model")
            shutil.rmtree(tmp_path / "model", ignore_errors=True)

    consolidate(run, None, tmp_path / "sound")
    refuses_all(run / "checkpoints", canary, read)


def test_what_a_report_reads(finished: Path, canary: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in finished.iterdir():
        if path.is_file() and path.name != "report.html":
            shutil.copy(path, run)
    refuses_all(run, canary, lambda: write_report([run], tmp_path / "report.html"))


def test_models_and_tokenizers(world: SmallWorld, canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    task = load_task(write_task(tmp_path / "task"))

    def read() -> None:
        for each in (
            lambda: load_model(str(folder)),
            lambda: load_classifier(str(folder), task, load_tokenizer(str(folder))),
            lambda: ModelFolder.open(str(folder)).tensors,
        ):
            read_in_vain(each)

    load_model(str(folder))
    refuses_all(folder, canary, read)


BESIDE = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "training_args.bin",
          "optimizer.pt", "rng_state.pth", "vocab.pkl", "spiece.model")  # fmt: skip
REMOTE = {
    "AutoConfig": "evil.Evil",
    "AutoModelForMaskedLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", None],
}


def test_what_lies_beside_a_model(world: SmallWorld, canary: Path, tmp_path: Path) -> None:
    """Pickles of every name that transformers and peft know, an index that points to one, code of its own."""
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    for name in BESIDE:
        (folder / name).write_bytes(torch_file(canary))
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["query"],
        "base_model_name_or_path": str(folder),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "evil.py").write_bytes(code_file(canary))
    config = json.loads((folder / "config.json").read_text())

    def attempts() -> None:
        read_in_vain(lambda: load_model(str(folder)))
        read_in_vain(lambda: load_tokenizer(str(folder)))
        read_in_vain(lambda: ModelFolder.open(str(folder)).tensors)

    for settings in ({}, {"auto_map": REMOTE}, {"auto_map": REMOTE, "model_type": "evil"}):
        (folder / "config.json").write_text(json.dumps(config | settings))
        own = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(own | settings))
        attempts()
        assert not canary.exists(), settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").unlink()
    index = {"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    attempts()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="pickled"):
        load_model(str(folder))
    assert not canary.exists()


def test_corpora(world: SmallWorld, canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(world.corpus, folder)
    sizes = {path: path.stat().st_size for path in folder.rglob("*.arrow")}

    def read() -> None:
        for path in (folder, folder / "validation"):
            corpus = Corpus.open(path)
            corpus.verify(0, 1)
            corpus.rows(np.arange(len(corpus)))

    refuses_all(folder, canary, read)
    for path in sizes:  # a manifest that was made to fit
        manifest = path.parent / "manifest.json"
        content = checked(json.loads(manifest.read_text()))
        for payload in (arrow_file(canary), torch_file(canary)):
            with planted(path, payload):
                for each in content["shards"]:
                    each |= vars(record_of(path)) | {"rows": 1}
                with (
                    planted(manifest, json.dumps(with_checksum(content)).encode()),
                    contextlib.suppress(Exception),
                ):
                    read()
            assert not canary.exists()


def test_raw_text(canary: Path, tmp_path: Path) -> None:
    """Files of every ending, saved datasets, archives with pickles in them."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a b", "c d"]}).save_to_disk(saved)

    def read(path: Path) -> None:
        options = ReadOptions("text", whole_files=False)
        for number, source in enumerate(find_sources([str(path)])):
            for segment in segments(number, source, options, 1 << 20):
                list(read_segment(source, segment, options, Records()))

    refuses_all(saved, canary, lambda: read(saved))
    text = tmp_path / "text"
    text.mkdir()
    with tarfile.open(text / "all.tar", "w") as archive:
        for name in ("1.pkl", "1.pickle", "1.pth", "1.pyd", "2.npy", "2.text"):
            content = numpy_file(canary) if name.endswith("npy") else torch_file(canary)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for name in ("a.pkl", "a.pickle", "a.npy", "a.pth", "a.parquet", "a.jsonl", "a.csv", "a.arrow", "a.h5"):
        (text / name).write_bytes(arrow_file(canary) if name == "a.arrow" else pickle.dumps(Payload(canary)))
    (text / "text.py").write_bytes(code_file(canary))  # a loading script, as datasets before 4 ran them
    for path in sorted(text.iterdir()):
        read_in_vain(lambda path=path: read(path))
        assert not canary.exists(), path


def write_task(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"text": f"word {n}", "label": "ab"[n % 2]}) for n in range(6)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_end_tasks_suites_and_settings(canary: Path, tmp_path: Path, world: SmallWorld) -> None:
    task = write_task(tmp_path / "task")
    refuses_all(task, canary, lambda: load_task(task))
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_bytes(code_file(canary))
    (script / "data.pkl").write_bytes(pickle.dumps(Payload(canary)))
    read_in_vain(lambda: exported(str(script), tmp_path / "out"))
    for name, read in {
        "run.yaml": lambda path: read_config([f"--config={path}"]),
        "suite.yaml": load_suite,
        "gpu.yaml": lambda path: find_gpu(str(path)),
        "ds.json": lambda path: read_config(arguments(world, tmp_path / "run", ds_config=path)),
        "experts.json": read_experts,
    }.items():
        for content in payloads(name, canary):
            (tmp_path / name).write_bytes(content)
            read_in_vain(lambda read=read, name=name: read(tmp_path / name))
            assert not canary.exists(), name


def test_what_a_run_measured(world: SmallWorld, canary: Path, tmp_path: Path) -> None:
    """Importance, the warmed-up head and the Fisher."""
    folder = tmp_path / "run"
    folder.mkdir()
    loaded = load_model(str(world.model))
    fragment = Fragment("w", 0, (4,), torch.ones(4))
    Importance({"heads": torch.rand(2, 4)}, {}).save(folder / "importance.safetensors")
    save_head(loaded.model, loaded.anatomy, folder / "head.safetensors")
    save_fisher(folder / "fisher", {key_of(fragment): torch.ones(4)}, [fragment], single_process())

    def read() -> None:
        for each in (
            lambda: Importance.load(folder / "importance.safetensors"),
            lambda: load_head(loaded.model, loaded.anatomy, folder / "head.safetensors"),
            lambda: load_fisher(folder / "fisher", [fragment], single_process()),
        ):
            read_in_vain(each)

    refuses_all(folder, canary, read)


SECRETS = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "WANDB_API_KEY": "canary-wandb-0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/abcdef",
    "AWS_SESSION_TOKEN": "canary-session-0123",
    "DATABASE_PASSWORD": "canary-database-pass",
    "GITHUB_TOKEN": "ghp_canary0123456789",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow",
}
URL_PASSWORD = "canary-in-the-address"


def carelessly(world: SmallWorld, folder: Path) -> list[Any]:
    """Shard, train and consolidate with secrets in the environment and an umask of 0; exit codes."""
    output = folder / "printed.txt"
    run = folder / "run"
    address = f"https://joe:{URL_PASSWORD}@example.com/model"
    flags = arguments(
        world, run, max_steps=2, corpus=folder / "corpus", eval_corpus=world.corpus / "validation"
    )
    commands: list[Callable[[], Any]] = [
        lambda: shard(
            [str(world.domain_text), "--tokenizer", str(world.model), "--sequence_length", "32", "--output",
             str(folder / "corpus"), "--validation_share", "0.1"]
        ),
        lambda: run_training(flags),
        lambda: consolidate(run, None, folder / "model") and 0,
        lambda: run_training(arguments(world, folder / "other", model=address)),
        lambda: shard([f"{address}?token={URL_PASSWORD}", "--tokenizer", "none", "--output", "none"]),
    ]  # fmt: skip
    kept, codes = [os.dup(number) for number in (1, 2)], []
    before = os.umask(0)
    os.environ.update(SECRETS)
    with open(output, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            for command in commands:
                os.umask(0)
                try:
                    run_main(command)
                except SystemExit as end:
                    codes.append(end.code)
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.umask(before)
            for name in SECRETS:
                del os.environ[name]
    return codes


def test_nothing_written_is_open_to_everybody_or_holds_a_secret(world: SmallWorld, tmp_path: Path) -> None:
    assert run_ranks(1, carelessly, world, tmp_path) == [[0, 0, 0, 2, 2]]
    written = sorted(tmp_path.rglob("*"))
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert {
        "corpus/manifest.json", "run/environment.json", "run/config.yaml", "run/report.html",
        "run/tensorboard", "run/model/README.md", "run/importance.safetensors", "model/model.safetensors",
    } <= names  # fmt: skip
    ours = [path for path in written if path.name != "printed.txt"]
    assert [path for path in ours if path.stat().st_mode & stat.S_IWOTH] == []
    printed = (tmp_path / "printed.txt").read_text()
    assert "step 2/2" in printed
    assert "https://***@example.com/model" in printed
    for secret in (*SECRETS.values(), URL_PASSWORD):
        holding = [path for path in written if path.is_file() and secret.encode() in path.read_bytes()]
        assert holding == [], secret
