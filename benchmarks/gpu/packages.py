"""Whether this Python has what the benchmark needs, and how to get that onto a machine without a network.

Imports the standard library and pip alone.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NoReturn

from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
OF_DEEPSPEED = ("einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "pydantic", "tqdm")
"""What it needs, where it is not installed and can't say so."""


def missing() -> list[str]:
    """Requirements of pyproject.toml, and of what is named there, that this Python does not fulfil."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'"([^"]+)"', text.partition("\ndependencies = [")[2].partition("\n]")[0])
    direct, lacking, seen = len(wanted), [], set()
    for number, requirement in enumerate(map(Requirement, wanted)):  # which grows, in any version
        marker = requirement.marker
        if requirement.name in seen or (marker and not marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            lacking.append(f"{requirement.name}{requirement.specifier}")
            wanted += OF_DEEPSPEED if requirement.name == "deepspeed" else ()
            continue
        if number < direct and not requirement.specifier.contains(found, prereleases=True):
            lacking.append(f"{requirement.name}{requirement.specifier} (there is {found})")
        if requirement.name != "torch":
            wanted += requires(requirement.name) or []
    return lacking


def advice(lacking: Sequence[str]) -> str:
    """How to get what is missing."""
    names = [repr(name.split(" ")[0]) for name in lacking]
    deepspeed = [name for name in names if name.startswith("'deepspeed")]
    upon_torch = [n for n in names if n[1:].startswith(("torch", "transformers", "accelerate", "peft"))]
    others = [name for name in names if name not in (*deepspeed, *upon_torch)]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    download = f"    pip download --only-binary=:all: --python-version {python} -d WHEELS"
    commands = [f"{download} {' '.join(others)}"] if others else []
    commands += [f"{download} --no-deps {' '.join(upon_torch)}"] if upon_torch else []
    commands += [f"    DS_BUILD_OPS=0 pip wheel --no-deps -w WHEELS {name}" for name in deepspeed]
    return "\n".join([
        f"missing for {sys.executable}: {', '.join(lacking)}",
        "Where there is a network: pip install them. Otherwise make a folder of wheels where there is one,",
        *commands,
        "and give it as --wheels WHEELS. What is installed here already need not stay in it.",
    ])  # fmt: skip


def refuse(message: str) -> NoReturn:
    """End as our programs end for a mistake of the user's; their own code can't be imported yet."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_with(wheels: Path, arguments: Sequence[str]) -> int:
    """Run the benchmark with the wheels of a folder installed for as long as it runs; its exit code."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        refuse(f"--wheels {wheels}: there is no file *.whl in it. Give the folder of the downloaded wheels.")
    with tempfile.TemporaryDirectory() as site:
        subprocess.run([*pip, "--no-deps", "--no-compile", "--upgrade", "--target", site, *files], check=True)
        path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
