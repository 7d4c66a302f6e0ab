"""One owner of a folder: among real processes, and against what another host's leaves in the file."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dga_scale.errors import UserError
from dga_scale.storage.lock import LOCK_FILE, Periods, owned, owned_output, token_in

NEVER = 1e6
"""Seconds that no test waits: what takes them hangs."""
WATCHED = Periods(beat=0.05, patience=0.2, settle=0.05)
SETTLE = 0.05

HOLDER = """
import os, sys, warnings
from pathlib import Path
from dga_scale.errors import UserError, run_main
from dga_scale.storage.lock import Periods, owned

folder, how, group, *periods = sys.argv[1:]

def main():
    with owned(Path(folder), group=group, periods=Periods(*map(float, periods))):
        if how == "fork":
            warnings.simplefilter("ignore")
            if os.fork() == 0:
                os.read(0, 1)
                os._exit(0)
        print("held", flush=True)
        os.read(0, 1)

def meet():
    inside = Path(folder).parent / "inside"
    left = 12
    while left:
        try:
            with owned(Path(folder), periods=Periods(settle=0.02)):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                inside.unlink()
                left -= 1
        except UserError:
            pass

run_main(meet if how == "meet" else main)
"""


class Holder:
    """A process that owns a folder until it is told to end."""

    def __init__(
        self, folder: Path, how: str = "hold", group: str = "", periods: Periods | None = None
    ) -> None:
        times = periods or Periods(beat=NEVER, patience=NEVER, settle=SETTLE)
        words = [str(folder), how, group, *map(str, (times.beat, times.patience, times.settle))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def holds(self) -> bool:
        """Wait until it owns the folder, or was refused."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() == "held\n"

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Let it leave, or send a signal; its exit code and what it printed as errors."""
        if number is not None:
            self.process.send_signal(number)
            self.process.wait(120)
        _, said = self.process.communicate("." if number is None else None, timeout=120)
        return self.process.returncode, said


def stranger(folder: Path, host: str = "faraway", token: str = "other") -> Path:
    """The lock file of a process on another host."""
    file = folder / LOCK_FILE
    values = {"token": token, "host": host, "kernel": "another", "pid": 77, "since": "noon", "command": "c"}
    file.write_text(json.dumps(values))
    return file


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Within, the file is touched all the time, as by its owner elsewhere."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.005):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def holder_in(folder: Path) -> int:
    return int(json.loads((folder / LOCK_FILE).read_text())["pid"])


def test_a_second_process_is_refused_and_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Holder(folder)
    assert first.holds()
    code, said = Holder(folder).end()
    assert code == 2
    assert said.startswith(f"error: {folder}: process {first.pid} on ")
    assert " (since 20" in said
    assert f"{folder} hold" in said, "the command"
    assert said.count("\n") == 1
    first.end(signal.SIGKILL)
    assert holder_in(folder) == first.pid, "nobody could remove it"
    third = Holder(folder)
    assert third.holds()
    assert holder_in(folder) == third.pid
    assert third.end() == (0, "")
    assert list(folder.iterdir()) == []


def test_a_holder_that_is_about_to_go_is_given_a_moment(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    assert first.holds()
    killer = threading.Timer(0.05, first.process.kill)
    killer.start()
    with owned(tmp_path, periods=Periods(settle=NEVER)):
        assert holder_in(tmp_path) == os.getpid()
    killer.join()
    first.process.communicate()


def test_a_child_of_a_killed_holder_does_not_hold(tmp_path: Path) -> None:
    first = Holder(tmp_path, "fork")
    assert first.holds()
    os.kill(first.pid, signal.SIGKILL)
    os.waitpid(first.pid, 0)
    assert Holder(tmp_path).end() == (0, "")
    first.process.communicate(".")


def test_what_was_made_for_the_lock_goes(tmp_path: Path) -> None:
    with owned(tmp_path / "empty") as token:
        assert token_in(tmp_path / "empty") == token
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path / "filled"):
        (tmp_path / "filled" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["filled", "file"]
    with owned(tmp_path / "filled"):
        pass
    assert token_in(tmp_path / "filled") is None


def test_one_of_many_at_a_time(tmp_path: Path) -> None:
    """Files come and go all the time: none of them is held by one process while another has its successor."""
    holders = [Holder(tmp_path / "run", "meet") for _ in range(4)]
    assert [holder.end() for holder in holders] == [(0, "")] * 4


def test_a_file_that_has_a_successor_by_the_time_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owned(tmp_path):
        name = (tmp_path / LOCK_FILE).read_text()
    (tmp_path / LOCK_FILE).write_text(name)
    flock, successors = fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        if not successors:
            (tmp_path / LOCK_FILE).unlink()
            successors.append(os.open(tmp_path / LOCK_FILE, os.O_CREAT | os.O_RDWR))
            os.write(successors[0], name.encode())
            flock(successors[0], fcntl.LOCK_EX)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    quick = Periods(settle=SETTLE)
    with pytest.raises(UserError, match="is writing here"), owned(tmp_path, periods=quick):
        pass
    os.close(successors[0])


def test_an_output_that_does_not_exist_yet(tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    with owned_output(output):
        assert not output.exists()
        quick = Periods(settle=SETTLE)
        with (
            pytest.raises(UserError, match=f"model: process {os.getpid()} on "),
            owned_output(output, periods=quick),
        ):
            pass
        with owned_output(output.with_name("other")):
            pass
    assert list(output.parent.iterdir()) == []


def test_a_silent_holder_on_another_host_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger(tmp_path)
    with owned(tmp_path, periods=WATCHED) as token:
        assert token_in(tmp_path) == token
    said = (
        f"{tmp_path}: process 77 on faraway (since noon: c) was writing here: waiting 0.2 s for a sign of it"
    )
    assert capsys.readouterr().err == f"{said}\n"


def test_a_beating_holder_on_another_host_is_left_alone(tmp_path: Path) -> None:
    file = stranger(tmp_path)
    before = file.read_bytes()
    periods = Periods(beat=0.05, patience=NEVER, settle=SETTLE)
    with (
        beating(file),
        pytest.raises(UserError, match=r"process 77 on faraway .*remove .*lock$"),
        owned(tmp_path, periods=periods),
    ):
        pass
    assert file.read_bytes() == before


def test_a_holder_on_another_host_that_leaves_meanwhile(tmp_path: Path) -> None:
    file = stranger(tmp_path)
    threading.Timer(0.05, file.unlink).start()
    with owned(tmp_path, periods=Periods(beat=0.05, patience=NEVER, settle=SETTLE)) as token:
        assert token_in(tmp_path) == token


def test_of_two_hosts_that_waited_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernel locks are not shared both write their name: the last one stays."""
    stranger(tmp_path)
    fsync = os.fsync

    def other_host_too(descriptor: int) -> None:
        fsync(descriptor)
        stranger(tmp_path, "thirdhost")

    monkeypatch.setattr(os, "fsync", other_host_too)
    with pytest.raises(UserError, match="on thirdhost"), owned(tmp_path, periods=WATCHED):
        pass
    assert token_in(tmp_path) == "other"


@pytest.mark.parametrize(
    "content", [b"", b'{"token": "abc", "ho', b"[" * 5000, b'{"pid": 1}', b"[1]", b"\xff"]
)
def test_a_file_that_was_not_written_whole(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with owned(tmp_path, periods=Periods(patience=NEVER, settle=SETTLE)) as token:
        assert token_in(tmp_path) == token


def test_a_holder_that_slept_while_it_was_taken_over_ends(tmp_path: Path) -> None:
    holder = Holder(tmp_path, periods=Periods(beat=0.05, settle=SETTLE))
    assert holder.holds()
    holder.process.send_signal(signal.SIGSTOP)
    stranger(tmp_path)
    code, said = holder.end(signal.SIGCONT)
    assert code == 2
    assert said.startswith(f"error: {tmp_path}: process 77 on faraway (since noon: c) has taken it over")
    assert token_in(tmp_path) == "other"


@pytest.mark.parametrize("made_again", [False, True])
def test_a_holder_whose_folder_goes_ends(made_again: bool, tmp_path: Path) -> None:
    """Also where another folder has its name by then, such as one that a save made."""
    folder, other = tmp_path / "run", tmp_path / "other"
    holder = Holder(folder, periods=Periods(beat=0.05, settle=SETTLE))
    assert holder.holds()
    other.mkdir()
    holder.process.send_signal(signal.SIGSTOP)
    folder.rename(tmp_path / "elsewhere")
    if made_again:
        other.rename(folder)
    holder.process.send_signal(signal.SIGCONT)
    code = holder.process.wait(timeout=120)
    assert (code, holder.end()[1]) == (
        2,
        f"error: {folder}: it was removed or renamed while this process was writing there\n",
    )


def test_a_lock_file_that_is_removed_comes_back(tmp_path: Path) -> None:
    holder = Holder(tmp_path, periods=Periods(beat=0.05, settle=SETTLE))
    assert holder.holds()
    token = token_in(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    while token_in(tmp_path) is None:
        assert holder.process.poll() is None
    code, said = Holder(tmp_path).end()
    assert (code, f"process {holder.pid} on " in said) == (2, True)
    assert token_in(tmp_path) == token
    assert holder.end() == (0, "")
    assert token_in(tmp_path) is None


def test_a_group_owns_a_folder_together(tmp_path: Path) -> None:
    stranger(tmp_path, token="plan")  # one of them, on another host: nobody waits for it
    group = [Holder(tmp_path, group="plan") for _ in range(3)]
    assert all(each.holds() for each in group)
    for other in (Holder(tmp_path), Holder(tmp_path, group="another plan")):
        assert other.end()[0] == 2
    group[0].end(signal.SIGKILL)
    assert group[1].end() == (0, "")
    assert Holder(tmp_path).end()[0] == 2
    assert token_in(tmp_path) == "plan"
    assert group[2].end() == (0, "")
    assert token_in(tmp_path) is None
    alone = Holder(tmp_path)
    assert alone.holds()
    assert Holder(tmp_path, group="plan").end()[0] == 2
    assert alone.end() == (0, "")


def test_without_kernel_locks_the_beat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with owned(tmp_path, periods=Periods(beat=0.01, settle=SETTLE)):
        periods = Periods(beat=0.05, patience=NEVER, settle=SETTLE)
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), owned(tmp_path, periods=periods):
            pass
        left = (tmp_path / LOCK_FILE).read_text()
    (tmp_path / LOCK_FILE).write_text(left)  # as of one that was killed
    with owned(tmp_path, periods=WATCHED) as token:
        assert token_in(tmp_path) == token != json.loads(left)["token"]


def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / LOCK_FILE).mkdir(parents=True)
    for folder, problem in ((tmp_path / "file", "File exists"), (tmp_path / "run", "Is a directory")):
        with pytest.raises(UserError, match=f"can't be locked: {problem}"), owned(folder):
            pass
