"""Where figures are kept: a section appended to RESULTS.md with command, machine and versions."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")


def append_section(title: str, body: str, command: str, path: Path = RESULTS) -> None:
    """Print ``body`` (Markdown) and append it to ``path`` under ``title``, with how it was measured."""
    print(body, flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(f"\n## {title}\n\n{date.today()}, {machine}, {versions}.\n\n    {command}\n\n{body}\n")
