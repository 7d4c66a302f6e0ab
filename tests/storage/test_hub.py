"""A hub that can't be reached is asked twice in all, one that is slow is left to its client."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dga_scale.storage import hub
from tests.helpers.ranks import free_port

PROGRAM = """
import huggingface_hub
from dga_scale.backbone.loading import load_model_config
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError

session = huggingface_hub.get_session()
session.event_hooks["request"].append(lambda request: print("REQUEST", request.method, request.url))
for load in (load_model_config, load_tokenizer):
    try:
        load("no-such-model")
    except UserError as error:
        print("REFUSED", error)
"""


def test_a_wrong_name_is_refused_after_two_requests(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=600)
    lines = done.stdout.splitlines()
    asked = [line for line in lines if line.startswith("REQUEST")]
    assert asked.count(f"REQUEST HEAD {endpoint}") == 2
    assert not [line for line in asked if "no-such-model" in line]
    refused = [line for line in lines if line.startswith("REFUSED")]
    assert len(refused) == 2
    assert all(re.match(r"REFUSED no-such-model: .* can't be loaded", line) for line in refused)
    assert "Retrying" not in done.stderr


class ConnectError(Exception):
    """Called as the HTTP client's, by whose name it is known."""


class ReadTimeout(Exception):
    """The same of a hub that took the connection and does not answer yet."""


@pytest.mark.parametrize(
    ("answers", "offline"),
    [
        ([None], False),
        ([ReadTimeout()], False),
        ([ConnectError(), None], False),
        ([ConnectError(), ConnectError()], True),
    ],
)
def test_only_a_hub_without_connection_is_offline(
    monkeypatch: pytest.MonkeyPatch, answers: list[Exception | None], offline: bool
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            if (error := answers.pop(0)) is not None:
                raise error

    hub._offline.cache_clear()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    try:
        assert hub.local_only("some-model") is offline
        assert answers == []
    finally:
        hub._offline.cache_clear()


def test_a_folder_asks_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused() -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_offline", refused)
    assert hub.local_only(str(tmp_path))
