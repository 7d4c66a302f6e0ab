"""Warnings, and errors that Python only prints, fail the tests whose ranks and commands they happen in."""

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from tests.helpers.forks import launch
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.strict import LOST, python_warnings


@pytest.fixture(autouse=True)
def _filters(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("pythonwarnings"):
        pytest.skip("-W asks for other filters than pyproject.toml's")


def _warn() -> None:
    warnings.warn("this is old", DeprecationWarning, 2)


def _leave_a_file_open() -> None:
    _forget(open(__file__))  # noqa: SIM115 - what is to be found


def _forget(file: object) -> None:
    """Let ``file`` go."""


def _fail_in_a_thread() -> None:
    thread = threading.Thread(target=_warn)
    thread.start()
    thread.join()


FAULTS = [
    (_warn, "DeprecationWarning: this is old"),
    (_leave_a_file_open, "ResourceWarning: unclosed file"),
    (_fail_in_a_thread, "DeprecationWarning: this is old"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_rank_of_a_pool_fails_with_the_text(fault, said):
    with pytest.raises(RankError, match=said):
        run_ranks(1, fault)
    run_ranks(1, _forget, None)  # no call fails on what an earlier one left


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_forked_rank_fails_with_the_text(fault, said):
    launched = launch(1, fault)
    assert launched.wait() == [1]
    assert said in launched.output(0)


def _command(program: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_a_command_fails_unless_the_warning_is_named(tmp_path: Path):
    code, said = _command("import warnings; warnings.warn('this is old')")
    assert code == 1
    assert "UserWarning: this is old" in said
    named = "`is_gradient_checkpointing` is deprecated, and more"
    assert _command(f"import warnings; warnings.warn({named!r}, FutureWarning)") == (0, "")
    code, said = _command(f"open({str(tmp_path / 'file')!r}, 'w')")
    assert code == 0
    assert LOST in said
    assert "ResourceWarning: unclosed file" in said


@pytest.mark.parametrize("message", [".*old", "old, really", r"old \(2\)"])
def test_a_filter_that_pythonwarnings_reads_otherwise_is_refused(message):
    plain = ["error", "ignore:it is. Old:UserWarning"]
    assert python_warnings(plain) == ",".join(plain)
    with pytest.raises(ValueError, match="give the plain start"):
        python_warnings([*plain, f"ignore:{message}:UserWarning"])
