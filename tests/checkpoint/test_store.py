"""Committed folders: what counts as complete, which is chosen, which are removed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dga_scale.checkpoint.store import (
    Checkpoint,
    checkpoint_path,
    commit,
    find_resume_point,
    newest_complete,
    newest_verified,
    prune,
    remove_leftovers,
)
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster, single_process
from dga_scale.storage.checked_json import checked
from dga_scale.storage.safetensors_stream import FileRecord, record_of
from tests.helpers.ranks import run_ranks

ALONE = single_process()
FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "model/config.json")
HEAD = FileRecord(5, "a hash")


def made(run: Path, step: int) -> Path:
    """Commit a checkpoint of three small files."""
    final = checkpoint_path(run, step)
    temporary = final.with_name(final.name + ".tmp")
    for name in FILES:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(f"{step} {name}".encode() * 50)
    files = {name: record_of(temporary / name) for name in FILES}
    commit(temporary, final, files, step, world_size=2, companions={"head.safetensors": HEAD})
    return final


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_chosen_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (5, 999_999, 1_000_000):
        made(tmp_path, step)
    found = find_resume_point(tmp_path, "auto", ALONE)
    assert found == newest_verified(tmp_path, ALONE)
    assert found is not None
    assert (found.step, found.world_size, found.skipped) == (1_000_000, 2, ())
    assert [path.name for path in found.shards] == list(FILES[:2])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-1000000\n"


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path, "auto", ALONE) is None
    assert find_resume_point(tmp_path, "never", ALONE) is None
    assert newest_complete(tmp_path) is None


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    final = made(tmp_path, 1)
    final.rename(final.with_name("step-000002.tmp"))
    assert find_resume_point(tmp_path, "auto", ALONE) is None
    made(tmp_path, 2)
    assert not (tmp_path / "checkpoints" / "step-000002.tmp").exists()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / FILES[1]).unlink(), r"rank-00001.safetensors is missing"),
        (
            lambda path: (path / FILES[1]).write_bytes(b"cut"),
            r"rank-00001.safetensors has 3 bytes instead of 1200",
        ),
        (
            lambda path: flip(path / FILES[1]),
            r"rank-00001.safetensors does not have the content .* \(sha256\)",
        ),
        (lambda path: flip(path / FILES[2]), r"model/config.json does not have the content"),
        (lambda path: (path / "manifest.json").unlink(), r"manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"format"'), r"manifest.json is damaged"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 2}'),
            r"manifest.json is damaged \(it has no checksum\)",
        ),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 3}'),
            r"has format 3, this version reads 2",
        ),
    ],
)
def test_a_damaged_one_is_named_and_the_older_taken(damage: object, problem: str, tmp_path: Path) -> None:
    older, newer = made(tmp_path, 1), made(tmp_path, 2)
    damage(newer)  # type: ignore[operator]
    found = find_resume_point(tmp_path, "auto", ALONE)
    assert found is not None
    assert found.path == older
    assert len(found.skipped) == 1
    with pytest.raises(UserError, match=problem):
        find_resume_point(tmp_path, str(newer), ALONE)
    damage(older)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"no checkpoint in .* is complete: .*{problem}.*; .*{problem}"):
        find_resume_point(tmp_path, "auto", ALONE)


def test_the_quick_look_does_not_read_content(tmp_path: Path) -> None:
    newer = made(tmp_path, 2)
    flip(newer / FILES[0])
    found = newest_complete(tmp_path)
    assert found is not None
    assert found.step == 2
    (newer / FILES[0]).unlink()
    assert newest_complete(tmp_path) is None


def test_resume_never_and_resume_from_a_path(tmp_path: Path) -> None:
    older = made(tmp_path, 1)
    made(tmp_path, 2)
    with pytest.raises(
        UserError, match=r"already holds step-000002. Give a new --output_dir, or --resume auto"
    ):
        find_resume_point(tmp_path, "never", ALONE)
    found = find_resume_point(tmp_path / "elsewhere", str(older), ALONE)
    assert found is not None
    assert found.step == 1
    with pytest.raises(
        UserError, match=r"--resume nope: no such folder\. Give auto, never, or the folder of a"
    ):
        find_resume_point(tmp_path, "nope", ALONE)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            UserError, match=r"no checkpoint, but .*Give one of them: .*checkpoints/step-000002\."
        ):
            find_resume_point(tmp_path / "elsewhere", str(folder), ALONE)


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = made(tmp_path, 3)
    flip(path / FILES[0])
    made(tmp_path, 3)
    found = newest_verified(tmp_path, ALONE)
    assert found is not None
    assert found.step == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-000003"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_kill_while_one_is_replaced(renamed: bool, tmp_path: Path) -> None:
    """Between the two renames the old one is put back; after them it is removed."""
    final = made(tmp_path, 3)
    shutil.copytree(final, final.with_name(final.name + ".old"))
    final.rename(final.with_name(final.name + ".tmp"))
    if renamed:
        final.with_name(final.name + ".tmp").rename(final)
    (tmp_path / "config.yaml.tmp").touch()
    remove_leftovers(tmp_path)
    found = newest_verified(tmp_path, ALONE)
    assert found is not None
    assert found.step == 3
    assert sorted(p.name for p in final.parent.iterdir()) == ["latest", "step-000003"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_kill_while_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        made(tmp_path, step)

    def killed(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 2, 3)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert left == ["step-000001.tmp", "step-000002", "step-000003"]
    remove_leftovers(tmp_path)
    assert not (tmp_path / "checkpoints" / "step-000001.tmp").exists()


def test_a_file_that_another_rank_wrote_elsewhere(tmp_path: Path) -> None:
    final = checkpoint_path(tmp_path, 1)
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    (temporary / "rank-00000.safetensors").write_bytes(b"here")
    record = record_of(temporary / "rank-00000.safetensors")
    files = {"rank-00000.safetensors": record, "rank-00001.safetensors": record}
    with pytest.raises(
        UserError, match=r"does not see the 4 bytes of rank-00001.*file system that all nodes share"
    ):
        commit(temporary, final, files, 1, world_size=2)
    assert not final.exists()


@pytest.mark.parametrize(("limit", "kept"), [(0, [1, 2, 3, 10]), (2, [3, 10]), (9, [1, 2, 3, 10])])
def test_pruning(limit: int, kept: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        made(tmp_path, step)
    prune(tmp_path, limit, 10)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert left == [f"step-{step:06d}" for step in kept]


def test_what_was_skipped_takes_no_room(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        made(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step-000003" / FILES[0])
    prune(tmp_path, 1, 2)
    found = newest_verified(tmp_path, ALONE)
    assert found is not None
    assert found.step == 2
    assert not (tmp_path / "checkpoints" / "step-000001").exists()


def chosen_by_all(run: Path) -> Checkpoint | None:
    return find_resume_point(run, "auto", join_cluster())


def test_all_ranks_choose_the_same(tmp_path: Path) -> None:
    """Each file is read by one rank; what one finds, all know."""
    older, newer = made(tmp_path, 1), made(tmp_path, 2)
    flip(newer / FILES[1])
    found = run_ranks(2, chosen_by_all, tmp_path)
    assert found[0] == found[1]
    assert found[0].path == older
    assert FILES[1] in found[0].skipped[0]


def test_the_manifest_is_plain_data(tmp_path: Path) -> None:
    path = made(tmp_path, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    checked(manifest)
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (2, 4, 2)
    assert manifest["companions"] == {"head.safetensors": {"bytes": 5, "sha256": "a hash"}}
    assert manifest["files"] == {name: dataclasses.asdict(record_of(path / name)) for name in sorted(FILES)}
