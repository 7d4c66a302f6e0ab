"""Whether the Hugging Face hub can be reached, found out before its client tries again and again."""

import os
import time
from functools import lru_cache

_ATTEMPTS = 2
_SECONDS = 3.0
_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ProxyError")
"""Names of the HTTP client's errors: which client it is, httpx or its successor, depends on the version."""


def local_only(name_or_path: str) -> bool:
    """Return whether a model or tokenizer is read without the hub: a folder, or any name where it is offline.

    ``from_pretrained(name, local_files_only=local_only(name))`` then takes what was downloaded before, or
    fails at once; the hub's client would try a file that it misses six times, for 23 seconds.
    """
    return os.path.isdir(name_or_path) or _offline()


@lru_cache(maxsize=1)
def _offline() -> bool:
    """Return whether the hub is switched off or refuses connections; one that is slow to answer does not."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return True
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(1)  # a name server can miss a question
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception as error:
            if type(error).__name__ in _NO_CONNECTION:
                continue
        return False
    return True
