"""The benchmarks' help comes at once, and knows the flags of the commands that RESULTS.md names."""

import re
import subprocess
import sys

import pytest

from tests.helpers.ranks import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
STARTED = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__")
    for path in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
} - {"benchmarks.baselines"}  # which benchmarks.steps launches on its ranks
PROGRAM = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *(set(sys.modules) & {"torch", "transformers", "deepspeed"})))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
OF_A_GPU = {module for module in STARTED if module.startswith("benchmarks.gpu")}
"""They look for packages and a device before they read their flags."""


def commands() -> list[list[str]]:
    """Return the words of each command in RESULTS.md that is not marked with the commit of another script."""
    text = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    python -m (benchmarks.*)$", text, re.MULTILINE)
    return [line.split() for line in lines if "(commit" not in line]


def test_results_name_benchmarks_that_exist() -> None:
    named = {words[0] for words in commands()}
    assert named <= STARTED
    assert len(named) > 10


@pytest.mark.parametrize("module", sorted(STARTED - OF_A_GPU))
def test_help_imports_nothing_heavy_and_has_the_flags_of_the_results(module: str) -> None:
    words = [sys.executable, "-c", PROGRAM, module, "--help"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    printed, _, heavy = done.stdout.rpartition("imported:")
    assert heavy.split() == []
    known = set(re.findall(r"--\w+", printed.partition("options:")[2]))
    assert {
        word for name, *rest in commands() if name == module for word in rest if word[:2] == "--"
    } <= known
