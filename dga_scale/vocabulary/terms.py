"""Read the terms that a user lists, a line each."""

from dataclasses import dataclass
from pathlib import Path

from dga_scale.corpus.reading.cleaning import clean
from dga_scale.errors import UserError

_LONGEST = 200
"""The most characters of a term; a longer line is a text."""


@dataclass(frozen=True)
class Term:
    """A term, as text that is sharded has it, and where it was read."""

    text: str
    line: int
    path: Path

    def refused(self, problem: str) -> UserError:
        """Return the refusal of the term, with its line."""
        return UserError(f"line {self.line}: {self.text!r} {problem}", self.path)


def read_terms(path: Path) -> list[Term]:
    """Read a file of terms.

    Raises:
        UserError: It can't be read, or is empty; a line is no UTF-8, empty, too long, or names a term twice.
    """
    terms: dict[str, Term] = {}
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(
            f"it can't be read: {error.strerror}. Give a text file with a term a line", path
        ) from None
    for number, line in enumerate(lines, 1):
        term = Term(_term(line, f"line {number}", path), number, path)
        if first := terms.get(term.text):
            raise term.refused(f"stands in line {first.line} too. Remove one")
        terms[term.text] = term
    if not terms:
        raise UserError("it is empty. Give a text file with a term a line", path)
    return list(terms.values())


def _term(line: bytes, where: str, path: Path) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{line[error.start]:02x} is not UTF-8. Convert the file first, with iconv", path
        ) from None
    if not text.strip():
        raise UserError(f"{where} is empty. Remove it", path)
    if not text.isprintable() or text != " ".join(text.split()):
        raise UserError(
            f"{where}: {text!r} has spaces around it, or control characters. Write a term a line", path
        )
    if len(text) > _LONGEST:
        raise UserError(f"{where} has {len(text)} characters, a term at most {_LONGEST}", path)
    return clean(text)
