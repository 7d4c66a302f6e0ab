"""Worker processes that die; and under a real mpirun the same corpus, and one message for an error."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dga_scale.corpus.sharding.executor import Executor, Stage, under_mpi
from dga_scale.corpus.sharding.pipeline import shard_corpus
from dga_scale.corpus.sharding.staging import ShardSettings
from dga_scale.errors import EXIT_USER_ERROR, UserError
from tests.helpers import tiny_corpora as tiny
from tests.helpers.ranks import REPOSITORY
from tests.helpers.strict import LOST


def mpirun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).parent / "mpirun"
    if not launcher.exists():
        pytest.skip("needs mpirun beside python (pip install dga_scale[mpi])")
    command = [str(launcher), "--oversubscribe", "-n", str(ranks)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += [sys.executable, "tools/shard_corpus.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert LOST not in done.stderr, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.mpi
def test_ranks_make_the_corpus_of_one_process(wordpiece: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(900) + tiny.texts(50))
    options = ["--tokenizer", str(wordpiece), "--sequence_length", "32", "--shard_size", "0.01"]
    done = mpirun(2, str(path), "--output", str(tmp_path / "ranks"), *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents  ") == 1, "one rank alone prints the summary"
    shares = re.findall(r"(?:reading|tokenising): (\d+) of (\d+) to do", done.stderr)
    assert len(shares) == 2
    assert all(int(share) == -(-int(total) // 2) for share, total in shares)
    settings = ShardSettings(str(wordpiece), sequence_length=32, shard_size=0.01)
    shard_corpus([str(path)], tmp_path / "alone", settings)
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


@pytest.mark.mpi
def test_an_error_on_one_rank_ends_all_with_one_message(wordpiece: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(900))
    path.write_text(path.read_text() + "{broken\n")
    options = ["--tokenizer", str(wordpiece), "--output", str(tmp_path / "corpus"), "--shard_size", "0.01"]
    failed = mpirun(2, str(path), *options)
    assert failed.returncode == EXIT_USER_ERROR
    assert failed.stderr.count("error: ") == 1
    assert "a.jsonl:901 is not JSON" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.mpi
def test_an_mpirun_of_another_mpi_is_refused(wordpiece: Path, tmp_path: Path) -> None:
    """Each of its processes would take itself for the only one, and do all the work."""
    pytest.importorskip("mpi4py")
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(9))
    command = ["tools/shard_corpus.py", str(path), "--tokenizer", str(wordpiece)]
    failed = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "corpus")],
        cwd=REPOSITORY, env=os.environ | {"PMI_SIZE": "2", "PMI_RANK": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == EXIT_USER_ERROR
    assert "mpirun started 2 processes, but mpi4py counts 1" in failed.stderr
    assert not (tmp_path / "corpus").exists()


def test_array_tasks_and_ranks_exclude_each_other(
    wordpiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not under_mpi()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert under_mpi()
    with pytest.raises(UserError, match=r"--array_task under mpirun"):
        shard_corpus(["x"], tmp_path / "corpus", ShardSettings(str(wordpiece)), array_task=(0, 2))


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    calls = [partial(os._exit, 9)] * 2
    stage = Stage("dying", calls, [tmp_path / "0", tmp_path / "1"], tmp_path / "finished")
    with (
        Executor(4, tmp_path) as executor,
        pytest.raises(UserError, match=r"worker process was killed.*run the same"),
    ):
        executor.run(stage)
