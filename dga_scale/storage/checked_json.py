"""Small JSON files that carry a checksum of their content: a flipped byte is found before it is used.

The checksums of large files (shards, checkpoints) stand in a manifest, which is such a JSON file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


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
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
