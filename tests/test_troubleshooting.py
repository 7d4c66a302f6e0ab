"""The messages that the troubleshooting tables quote are those that the program says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

PAGES = ("docs/troubleshooting.md", "launchers/README.md")
OTHERS = {"launcher 'pdsh' not installed": "DeepSpeed's"}
"""Quoted messages of other programs."""
VARIABLE = r"\d[\d.]*"
"""What a message fills in; so are the words that a template does not have."""


@cache
def templates() -> list[str]:
    """All texts in the package; NUL stands for what an f-string fills in."""
    found = []
    for file in sorted((REPOSITORY / "dga_scale").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quotes(page: str) -> list[str]:
    """The messages in the first column of the page's tables of what one sees."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    tables = re.findall(r"^\| what you see .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return re.findall(r"^\| `([^`]+)`", "".join(tables), re.MULTILINE)


def is_said(quote: str) -> bool:
    """Return whether a template has the quote's words, at least half of them, and fills the others in."""
    for fragment in re.split(r"\s*\.\.\.\s*", quote):
        words = fragment.removeprefix("error: ").split()
        if len(words) < 2:
            continue
        pattern = r"\s".join(f"(?:({re.escape(word)})|[^\\s\0]*\0[^\\s\0]*)" for word in words)
        matches = (match for text in templates() for match in re.finditer(pattern, text))
        if not any(sum(each is not None for each in match.groups()) >= len(words) / 2 for match in matches):
            return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_quoted_messages_are_said(page: str) -> None:
    quoted = quotes(page)
    assert len(quoted) > 8
    assert [quote for quote in quoted if quote not in OTHERS and not is_said(quote)] == []


def test_what_is_said_nowhere() -> None:
    assert is_said("2 of 8 ranks did not join within 600 s")
    assert not is_said("2 of 8 ranks did not come within 600 s")
    assert Path(REPOSITORY / PAGES[0]).is_file()
