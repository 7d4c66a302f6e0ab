"""Help, and a flag that is refused, come without the seconds that heavy packages take to import."""

import subprocess
import sys
from importlib import metadata

import pytest

HEAVY = ("torch", "transformers", "deepspeed", "sklearn", "scipy", "datasets", "matplotlib")
INSTALLED = metadata.entry_points(group="console_scripts")
COMMANDS = {entry.name: entry.value for entry in INSTALLED if entry.name.startswith("dga-")}
PROGRAM = """
import atexit, sys
module, function, *sys.argv = sys.argv[1:]
atexit.register(lambda: print("imported:", *(set(sys.modules) & {HEAVY}), flush=True))
getattr(__import__(module, fromlist=["_"]), function)()
""".replace("{HEAVY}", str(set(HEAVY)))

REFUSED = {
    "dga-train": ["--max_stpes", "3"],
    "dga-plan": ["--gpus", "8", "--gpu", "h100", "--ds_config", "x.json", "--max_stpes", "3"],
    "dga-submit": ["--account", "a", "--time", "1:00:00", "train", "--max_stpes", "3"],
}
"""What is refused by the settings of training, which two commands pass on; by others, any unknown flag."""


def imported(command: str, arguments: list[str]) -> tuple[int, str, list[str]]:
    """Exit code, what is printed, and which of the heavy packages a command imports."""
    module, _, function = COMMANDS[command].partition(":")
    words = [sys.executable, "-c", PROGRAM, module, function, command, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    printed, _, heavy = done.stdout.rpartition("imported:")
    return done.returncode, printed + done.stderr, heavy.split()


def test_all_commands_are_looked_at() -> None:
    assert len(COMMANDS) == 12


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    code, printed, heavy = imported(command, ["--help"])
    assert code == 0, printed
    assert "usage:" in printed
    assert heavy == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_refused_flag_imports_nothing_heavy(command: str) -> None:
    code, printed, heavy = imported(command, REFUSED.get(command, ["--no_such_flag"]))
    assert code == 2, printed
    assert len(printed.strip().splitlines()) == 1, printed
    assert printed.startswith("error: ")
    assert heavy == []
