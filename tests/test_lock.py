"""constraints.txt is what ``make lock`` makes of pyproject.toml, and nothing of the machine that made it."""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def locked() -> dict[str, list[Requirement]]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_every_version_is_in_the_range_that_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    versions = locked()
    for requirement in map(Requirement, declared):
        if requirement.name == project["name"]:
            continue
        assert canonicalize_name(requirement.name) in versions, f"{requirement}: run make lock"
        for each in versions[canonicalize_name(requirement.name)]:
            (pin,) = each.specifier
            assert pin.operator == "==", each
            assert requirement.specifier.contains(pin.version), f"{requirement}, but {each}: run make lock"


def test_no_build_of_torch_and_no_address_is_pinned() -> None:
    for name, pins in locked().items():
        assert not re.match(r"nvidia-|cuda-|triton$", name)
        for pin in pins:
            assert pin.url is None
            assert "+" not in str(pin.specifier)
    assert "://" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")
