"""Each file that a run reads again, lost or changed: found before use and named; an older one, or a stop."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dga_scale.backbone.loading import load_model
from dga_scale.backbone.warmup import load_head, save_head
from dga_scale.checkpoint.fisher import load_fisher
from dga_scale.checkpoint.store import find_resume_point
from dga_scale.config.parsing import read_config
from dga_scale.corpus.shards import Corpus
from dga_scale.errors import UserError
from dga_scale.launch.world import single_process
from dga_scale.logging.json_lines import read_log
from dga_scale.objectives.methods.cse import _read as read_experts
from dga_scale.preservation.importance import Importance
from dga_scale.storage.checked_json import CHECKSUM
from dga_scale.storage.checked_tensors import load_tensors
from dga_scale.train.inputs import check_inputs
from tests.helpers.damage import DAMAGES, every_damage, flip
from tests.helpers.flags import changed
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld, make_world
from tests.helpers.training import Setup, save, tiny_engine, train_step
from tests.test_methods import flags_of
from tests.test_train import run_training

ALONE = single_process()


# --- checkpoints -----------------------------------------------------------------------------------------


def two_checkpoints(folder: Path) -> None:
    engine = tiny_engine(Setup(2))
    for step in (1, 2):
        train_step(engine, step)
        save(engine, folder, step)
    engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after steps 1 and 2, of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, two_checkpoints, folder)
    return folder


def test_any_damaged_file_of_a_checkpoint_is_named_and_the_older_one_taken(
    saved: Path, tmp_path: Path
) -> None:
    newest = saved / "checkpoints" / "step-000002"
    cases = every_damage(newest)
    assert {"manifest.json", "trainer_state.json", "rank-00000.safetensors", "rank-00001.safetensors",
            "model/config.json", "model/tokenizer.json"} <= {file for file, _ in cases}  # fmt: skip
    whole = find_resume_point(saved, "auto", ALONE)
    assert whole is not None
    for number, (file, damage) in enumerate(cases):
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        DAMAGES[damage](run / "checkpoints" / "step-000002" / file)
        found = find_resume_point(run, "auto", ALONE)
        assert found is not None, (file, damage)
        if (file, damage) == ("manifest.json", "last byte cut"):  # its line's end, no more
            assert (found.step, found.files) == (2, whole.files)
            continue
        assert found.step == 1, (file, damage)
        # A manifest that says something else of a file shows at that file.
        named = "step-000002/" if file == "manifest.json" else f"step-000002/{file}"
        assert named in found.skipped[0], (file, damage)
        with pytest.raises(UserError, match="step-000002"):
            find_resume_point(run, str(run / "checkpoints" / "step-000002"), ALONE)
        shutil.rmtree(run)


def test_a_manifest_with_any_bit_flipped_is_refused_or_says_the_same(saved: Path, tmp_path: Path) -> None:
    run, draws = Path(shutil.copytree(saved, tmp_path / "run")), random.Random(0)
    manifest = run / "checkpoints" / "step-000002" / "manifest.json"
    whole = manifest.read_bytes()
    expected = find_resume_point(run, "auto", ALONE)
    assert expected is not None
    # The step and the number of ranks stand at the beginning; then come names, sizes and hashes.
    head = [(index / len(whole), bit) for index in range(64) for bit in range(3)]
    anywhere = [(draws.random(), draws.randrange(8)) for _ in range(100)]
    for position, bit in head + anywhere:
        flip(manifest, position, bit)
        found = find_resume_point(run, "auto", ALONE)
        assert found is not None
        assert found.step == 1 or found == expected, manifest.read_bytes()
        manifest.write_bytes(whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_is_for_people_only(saved: Path, tmp_path: Path, damage: str) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    DAMAGES[damage](run / "checkpoints" / "latest")
    found = find_resume_point(run, "auto", ALONE)
    assert found is not None
    assert (found.step, found.skipped) == (2, ())


# --- the other files of a run ----------------------------------------------------------------------------


OUTPUT = ("environment.json", "importance-heads.png", "report.html", "summary.json", "tensorboard/", "model/")
"""Files that are written for the user; a resumed run reads none of them."""


METHODS = ("dga", "ewc", "cse")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Finished runs of the methods that keep files of their own, with their flags."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for method in METHODS:
        flags = changed(flags_of(world, folder / method, method, 2), "--max_steps=2", "--save_steps=1")
        assert run_ranks(2, run_training, flags) == [0, 0]
        found[method] = (folder / method, flags)
    return found


def readers(run: Path, flags: list[str]) -> dict[str, Callable[[], Any]]:
    """Return how a resumed run reads each of its files, besides its checkpoints."""
    found: dict[str, Callable[[], Any]] = {
        "config.yaml": lambda: (
            check_inputs(read_config(changed(flags, f"--output_dir={run}")), ALONE).config.run
        ),
        "corpora.json": lambda: (
            check_inputs(read_config(changed(flags, f"--output_dir={run}")), ALONE).config.run
        ),
        "log.jsonl": lambda: read_log(run / "log.jsonl"),
        "importance.safetensors": lambda: Importance.load(run / "importance.safetensors").values,
        "experts.json": lambda: read_experts(run / "experts.json"),
    }
    return found | {
        f"fisher/{file.name}": lambda: load_fisher(run / "fisher", [], ALONE)
        for file in (run / "fisher").glob("*")
    }


@pytest.mark.parametrize("method", METHODS)
def test_any_other_file_is_found_damaged_or_says_the_same(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, method: str
) -> None:
    original, flags = runs[method]
    run = Path(shutil.copytree(original, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    (run / "checkpoints").mkdir()
    cases = [(file, damage) for file, damage in every_damage(run) if not file.startswith(OUTPUT)]
    known = readers(run, flags)
    assert {file for file, _ in cases} <= known.keys(), "a file that no test knows"
    for file, damage in cases:
        expected, kept = known[file](), (run / file).read_bytes()
        DAMAGES[damage](run / file)
        try:
            found = known[file]()
        except (UserError, OSError) as error:
            found = error
        (run / file).write_bytes(kept)
        assert found_or_harmless(run, file, found, expected), (file, damage, found)


def found_or_harmless(run: Path, file: str, found: Any, expected: Any) -> bool:
    """Return whether an error names the file, or the content read is the content written."""
    if isinstance(found, UserError):
        named = [str(run / file), f"--output_dir {run} holds"]
        if file == "fisher/manifest.json":  # what it says of a file shows at that file
            named.append(str(run / "fisher"))
        return any(name in str(found) for name in named)
    if file == "log.jsonl":  # for people: nothing of it is computed with
        return isinstance(found, list | FileNotFoundError)
    return same(found, expected)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and any(isinstance(value, torch.Tensor) for value in one.values()):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return bool(one == other)


def test_any_damage_to_a_warmed_up_head_is_found(world: SmallWorld, tmp_path: Path) -> None:
    loaded = load_model(str(world.model))
    path = tmp_path / "head.safetensors"
    save_head(loaded.model, loaded.anatomy, path)
    load_head(loaded.model, loaded.anatomy, path)
    kept = path.read_bytes()
    for damage in DAMAGES:
        DAMAGES[damage](path)
        with pytest.raises(UserError, match=r"head\.safetensors"):
            load_head(loaded.model, loaded.anatomy, path)
        path.write_bytes(kept)


def test_any_flipped_bit_of_importances_is_found(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    path, draws = tmp_path / "importance.safetensors", random.Random(0)
    shutil.copy(runs["dga"][0] / path.name, path)
    whole, expected = path.read_bytes(), load_tensors(path)
    for _ in range(200):
        flip(path, draws.random(), draws.randrange(8))
        try:
            tensors, metadata = load_tensors(path)
        except (ValueError, OSError, SafetensorError):
            pass
        else:  # white space of the header
            assert (same(tensors, expected[0]), metadata) == (True, expected[1])
        path.write_bytes(whole)


def refused_run(flags: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        run_training(flags)
    return str(caught.value)


def test_a_run_resumes_with_its_output_damaged_and_not_without_its_importance(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    original, flags = runs["dga"]
    run = Path(shutil.copytree(original, tmp_path / "run"))
    flags = changed(flags, f"--output_dir={run}")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    for path in run.rglob("*"):
        if path.is_file() and str(path.relative_to(run)).startswith(OUTPUT):
            flip(path)
    (run / "importance.safetensors").rename(tmp_path / "kept")
    for said in run_ranks(2, refused_run, flags):
        assert f"{run / 'importance.safetensors'} is missing" in said
    (tmp_path / "kept").rename(run / "importance.safetensors")
    assert run_ranks(2, run_training, flags) == [0, 0]
    assert [r for r in read_log(run / "log.jsonl") if "loss/total" in r][-1]["loss/total"] == [
        r for r in read_log(original / "log.jsonl") if "loss/total" in r
    ][-1]["loss/total"]


# --- a checksum that is lost -----------------------------------------------------------------------------


def without_checksum(path: Path) -> None:
    """Remove the checksum from a file, and leave all else unchanged."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        del content[CHECKSUM]
        path.write_text(json.dumps(content, indent=2) + "\n")
        return
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    del metadata[CHECKSUM]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("dga", "importance.safetensors"),
        ("cse", "experts.json"),
        ("ewc", "fisher/manifest.json"),
        ("ewc", "checkpoints/step-000002/manifest.json"),
    ],
)
def test_a_lost_checksum_is_refused(
    runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, method: str, file: str
) -> None:
    original, flags = runs[method]
    run = Path(shutil.copytree(original, tmp_path / "run"))
    without_checksum(run / file)
    if file.startswith("checkpoints"):
        flags = changed(flags, f"--resume={(run / file).parent}")
    with pytest.raises(UserError, match=f"{Path(file).name}.*has no checksum"):
        resumed(run, changed(flags, f"--output_dir={run}"), file)


def resumed(run: Path, flags: list[str], file: str) -> None:
    """Read ``file`` as a resumed run does."""
    if file.startswith("checkpoints"):
        find_resume_point(run, read_config(flags).run.resume, ALONE)
    else:
        readers(run, flags)[file]()


def test_a_lost_checksum_of_a_head_and_of_a_corpus_is_refused(world: SmallWorld, tmp_path: Path) -> None:
    loaded = load_model(str(world.model))
    head = tmp_path / "head.safetensors"
    save_head(loaded.model, loaded.anatomy, head)
    without_checksum(head)
    with pytest.raises(UserError, match=r"head\.safetensors.*has no checksum"):
        load_head(loaded.model, loaded.anatomy, head)
    corpus = Path(shutil.copytree(world.corpus, tmp_path / "corpus"))
    without_checksum(corpus / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(it has no checksum\)"):
        Corpus.open(corpus)
