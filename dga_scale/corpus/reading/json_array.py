"""Read a file that is one JSON array, an element at a time: all of it may not fit into memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from dga_scale.corpus.reading.files import Source, blocks, check_size
from dga_scale.errors import UserError
from dga_scale.storage.checked_json import json_problem

_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16
"""An error so near to the end of what is read may be of a word that is cut there."""


def read_array(source: Source, limit: int) -> Iterator[tuple[str, Any]]:
    """Yield where each element stands (file and line), and the element.

    Raises:
        UserError: The file can't be read, is no JSON array, or has an element of more than ``limit`` bytes;
            it names the line.
    """
    text = _Text(source, limit)
    text.expect("[")
    if not text.skip("]"):
        while True:
            yield text.element()
            if not text.skip(","):
                break
        text.expect("]")
    if text.next():
        raise UserError(f"{text.where()} has something behind the end of the array")


class _Text:
    """The text of a file, of which only what is not parsed yet is held."""

    def __init__(self, source: Source, limit: int) -> None:
        self._path, self._blocks, self._limit = source.path, blocks(source), limit
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._text, self._place, self._line, self._ended = "", 0, 1, False

    def where(self) -> str:
        return f"{self._path}:{self._line + self._text.count(chr(10), 0, self._place)}"

    def next(self) -> str:
        """Return the next character that is no space, without taking it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def skip(self, sign: str) -> bool:
        """Take ``sign``, if it is next."""
        found = self.next() == sign
        self._place += found
        return found

    def expect(self, sign: str) -> None:
        if not self.skip(sign):
            raise UserError(
                f"{self.where()} is not JSON: {sign!r} expected, {self.next() or 'the end'!r} found"
            )

    def element(self) -> tuple[str, Any]:
        """Take the next element; return where it stands, and what it is."""
        self.next()
        where = self.where()
        while True:
            try:
                value, self._place = self._json.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                if _may_be_cut(error, len(self._text)):
                    check_size(where, len(self._text) - self._place, self._limit)
                    if self._more():
                        continue
                raise UserError(f"{where} is not JSON: {json_problem(error)}") from error
            return where, value

    def _more(self) -> bool:
        """Read on: as much again as is held, so that a long element is not parsed for each block."""
        wanted = len(self._text) - self._place
        parts = [self._text[self._place :]]
        self._line += self._text.count("\n", 0, self._place)
        read = 0
        while not self._ended and read <= wanted:
            block = next(self._blocks, b"")
            self._ended = not block
            try:
                parts.append(self._decode(block, final=self._ended))
            except UnicodeDecodeError as error:
                before = "".join(parts).count("\n") + error.object[: error.start].count(b"\n")
                raise UserError(
                    f"{self._path}:{self._line + before} is not UTF-8: byte 0x{error.object[error.start]:02x}"
                ) from error
            read += len(parts[-1])
        self._text, self._place = "".join(parts), 0
        return read > 0


def _may_be_cut(error: Exception, length: int) -> bool:
    """Return whether JSON text of this length may be right but for its end, which is not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= length - _CUT
