"""Docstrings have one style: an entry of a section, and what is returned, begins with a capital."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ENTRY = re.compile(r" {4}\*{0,2}\w[\w, *.]*: (.+)")
TEXT = re.compile(r" {4}(\S.*)")
FILES = sorted((REPOSITORY / "dga_scale").rglob("*.py"))


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def lower_case(docstring: str) -> list[str]:
    """List the lines of sections that begin with a small letter and should not."""
    found, section, first = [], "", False
    for line in docstring.splitlines():
        if start := SECTION.fullmatch(line):
            section, first = start[1], True
        elif line and not line.startswith(" "):
            section = ""
        elif section and (entry := (TEXT if section in ("Returns", "Yields") else ENTRY).fullmatch(line)):
            if entry[1][0].islower() and (first or section not in ("Returns", "Yields")):
                found.append(line.strip())
            first = False
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_entries_of_sections_begin_with_a_capital(file: Path) -> None:
    assert [line for each in docstrings(file.read_text(encoding="utf-8")) for line in lower_case(each)] == []


def test_what_is_found() -> None:
    docstring = (
        "Add.\n\nArgs:\n    one: the first.\n    two: The other.\n        more: lines\n\n"
        "Returns:\n    the sum,\n    of both.\n\nRaises:\n    ValueError: too much.\n"
    )
    assert lower_case(docstring) == ["one: the first.", "the sum,", "ValueError: too much."]
