"""Safetensors written as a stream: as the library reads them; ranges over several files."""

import errno
import hashlib
import json
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dga_scale.errors import UserError
from dga_scale.storage import safetensors_stream as tensor_files
from dga_scale.storage.safetensors_stream import (
    Entry,
    FileRecord,
    SegmentReader,
    record_of,
    write_safetensors,
)


def entry(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Entry:
    return Entry(name, dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "transposed": torch.randn(4, 2).t(),
        "scalar": torch.tensor(3.5),
        "ids": torch.arange(5),
        "none": torch.empty(0, 4),
    }
    path = tmp_path / "x.safetensors"
    record = write_safetensors(path, [entry(n, t) for n, t in tensors.items()], {"made": "here"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert record == record_of(path)
    assert record.bytes == path.stat().st_size


def test_conversion_while_writing(tmp_path: Path) -> None:
    tensor = torch.randn(100)
    write_safetensors(tmp_path / "x", [entry("a", tensor, torch.bfloat16)], {})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor.bfloat16())


def write_segments(folder: Path, tensor: Tensor, cuts: list[int]) -> list[Path]:
    """Write the segments of a tensor into several files, in no particular order."""
    flat, files = tensor.view(-1), []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        file = folder / f"{9 - number}.safetensors"
        segments = {"weight:w": [start, list(tensor.shape)]}
        write_safetensors(file, [entry("weight:w", flat[start:stop])], {"segments": json.dumps(segments)})
        files.append(file)
    return files


@pytest.mark.parametrize("cuts", [[0, 35], [0, 1, 2, 20, 35], [0, 17, 35]])
def test_ranges_over_files(cuts: list[int], tmp_path: Path) -> None:
    tensor = torch.randn(5, 7)
    with SegmentReader(write_segments(tmp_path, tensor, cuts)) as reader:
        assert torch.equal(reader.full("weight:w"), tensor)
        for start, stop in [(0, 1), (3, 30), (19, 21), (34, 35)]:
            into = torch.full((stop - start,), float("nan"))
            assert reader.read("weight:w", start, into) == stop - start
            assert torch.equal(into, tensor.view(-1)[start:stop])


def test_a_gap_is_noticed(tmp_path: Path) -> None:
    files = write_segments(tmp_path, torch.randn(5, 7), [0, 10, 20, 35])
    with SegmentReader([files[0], files[2]]) as reader:
        assert reader.read("weight:w", 5, torch.empty(20)) == 10
        with pytest.raises(UserError, match="it has a part of weight:w only"):
            reader.full("weight:w")


def test_a_file_synced_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync often: the content is whole, and an error of the disk is raised."""
    monkeypatch.setattr(tensor_files, "_CHUNK", 1000)
    monkeypatch.setattr(tensor_files, "_SYNC_EVERY", 2000)
    tensors = {f"t{i}": torch.randn(1234) for i in range(5)}
    entries = [entry(n, t) for n, t in tensors.items()]
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), sync(file)))
    record = write_safetensors(tmp_path / "x", entries, {})
    assert len(synced) > 1
    assert synced[-1] == record.bytes
    assert record == FileRecord(
        record.bytes, hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    ) == record_of(tmp_path / "x")  # fmt: skip
    for name, tensor in load_file(tmp_path / "x").items():
        assert torch.equal(tensor, tensors[name])

    def fail_once(file: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="broken"):
        write_safetensors(tmp_path / "y", entries, {})


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """A file of 64 MB from tensors made when their turn comes: no more than two of them at once."""
    mib = 1 << 20

    def produce() -> Tensor:
        content = bytearray(4 * mib)  # what tracemalloc sees, unlike torch's own allocations
        return torch.frombuffer(content, dtype=torch.float32)

    entries = [Entry(f"t{i}", torch.float32, (mib,), produce) for i in range(16)]
    tracemalloc.start()
    write_safetensors(tmp_path / "big", entries, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "big").stat().st_size > 64 * mib
    assert peak < 12 * mib
