"""Small files that carry a checksum of what they say: a flipped byte is found before it is used.

Large files, of shards and checkpoints, have theirs in a manifest, which is such a file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum to what is written as JSON."""
    return {**content, CHECKSUM: _checksum(content)}


def checked(content: Any) -> dict[str, Any]:
    """Check what was read from JSON, and take the checksum off.

    Raises:
        ValueError: it is not what was written, or its checksum is lost.
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
