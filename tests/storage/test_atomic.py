"""Files that are complete or absent."""

import os
from pathlib import Path

import numpy as np
import pytest

from dga_scale.errors import UserError
from dga_scale.storage.atomic import atomic_file, storage_errors, write_array, write_json


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_file(target, tmp_path / "scratch") as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
        assert [path.stat().st_size for path in (tmp_path / "scratch").iterdir()] == [4]
        file.write(b" and half")
    assert target.read_bytes() == b"half and half"
    assert not list((tmp_path / "scratch").iterdir())


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    write_json(target, {"a": "é"}, tmp_path)
    with pytest.raises(ZeroDivisionError), atomic_file(target, tmp_path):
        raise ZeroDivisionError
    assert target.read_text() == '{\n  "a": "é"\n}\n'
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("shape", [(2, 0), (3, 5)])
def test_arrays(shape: tuple[int, int], tmp_path: Path) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    write_array(tmp_path / "a.npy", array, tmp_path)
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_folder_and_free_space(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    with (
        pytest.raises(UserError, match=rf"the disk of {missing} is full \(\d+\.\d MB free\): No space left"),
        storage_errors(missing),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/inside: it can't be written: Not a directory"),
        storage_errors(tmp_path),
    ):
        os.mkdir(tmp_path / "file" / "inside")
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "none").read_bytes()
