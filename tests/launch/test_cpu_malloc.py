"""Freed memory is kept, so that a step's large tensors cost no page faults again."""

import os
import platform
import subprocess
import sys

import pytest

PAGES = 25_000
"""Of 4 KB, in the tensor of 100 MB that the program below makes and drops."""

PROGRAM = """
import resource, sys
import torch
from dga_scale.launch.cpu_malloc import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(30):  # malloc needs a few before the holes that aligned blocks leave add up to one more block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(100_000_000, dtype=torch.uint8).fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(*arguments: str, **variables: str) -> int:
    """Page faults of making a large tensor for the thirtieth time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env={**kept, **variables},
                         capture_output=True, text=True, check=True)  # fmt: skip
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone has the settings")
def test_a_large_tensor_comes_without_page_faults_once_its_like_was_freed() -> None:
    assert faults() > PAGES * 0.9
    assert faults("keep") < PAGES * 0.01


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone has the settings")
def test_a_users_settings_of_malloc_stay() -> None:
    assert faults("keep", MALLOC_TOP_PAD_="0") > PAGES * 0.9
