"""Small JSON files: those that people wrote, and those of ours, which carry a checksum of their content.

A flipped byte is found before it is used. The checksums of large files (shards, checkpoints) stand in a
manifest, which is such a JSON file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dga_scale.errors import UserError

CHECKSUM = "checksum"


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: It can't be read, or holds something else.
    """
    try:
        return load_object(path)
    except OSError as error:
        raise UserError(f"it can't be read: {error.strerror}", path) from error
    except ValueError as error:
        raise UserError(f"{error}. Copy it again from where it was made", path) from error


def load_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        OSError: It can't be read.
        ValueError: It holds something else; the message says what.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise ValueError("no JSON object, like {...}")
    return content


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It can't be read.
        ValueError: It is no JSON; the message says why.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {json_problem(error)}") from error


def json_problem(error: Exception) -> str:
    """Say in words what is wrong with JSON text that could not be parsed."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).partition(";")[0]  # a number of thousands of digits


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file with its checksum added."""
    return {**content, CHECKSUM: _checksum(content)}


def checked(content: Any) -> dict[str, Any]:
    """Verify the content of a JSON file, and return it without its checksum.

    Raises:
        ValueError: The content is not what was written, or its checksum is missing.
    """
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise ValueError("it has no checksum")
    content = dict(content)
    if content.pop(CHECKSUM) != _checksum(content):
        raise ValueError("its content does not have its checksum")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    try:
        plain = json.loads(json.dumps(content))
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
