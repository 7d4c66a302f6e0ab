"""Every key of DeepSpeed's JSON that is accepted, with values that it can't have."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st

from dga_scale.config.parsing import read_config
from dga_scale.zero.ds_config import resolve_ds_config
from dga_scale.zero.ds_keys import Keys, known_keys, load_ds_config
from tests.helpers.nonsense import DEEP, DIGITS, HUGE, fuzz, refusal

WRONG = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", DIGITS, str(HUGE), f"-{HUGE}", DEEP, '{"a": 1}',
         "[[1]]", '"\\u0000"', '"\\ud800"', '{"a": {}, "a": 1}')  # fmt: skip
"""What no key has, as it is written."""

WRONG_SECTION = (*WRONG, "null", "3", "true", '"x"', "[]", '"auto"')
TRUTHS = (
    "enabled",
    "overlap_comm",
    "contiguous_gradients",
    "round_robin_gradients",
    "detailed",
    "pin_memory",
)
WRONG_TRUTH = ('"false"', '"x"', "0", "1.5", "[]")
ANY = ("null", "true", "false", "-1", "0", "1.5", "3", '"x"', '"auto"', '"false"', "[1, 2]", "[]", "{}", '""')
"""What one key or another may have."""


def keys(known: Keys, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Every key, by those above it, and whether it is a section."""
    for key, inner in known.items():
        yield (*above, key), isinstance(inner, Mapping)
        if isinstance(inner, Mapping):
            yield from keys(inner, (*above, key))


def nested(key: tuple[str, ...], value: str) -> str:
    """A JSON with one value in it."""
    for name in reversed(key):
        value = f"{{{json.dumps(name)}: {value}}}"
    return value


def wrong(key: tuple[str, ...], section: bool) -> tuple[str, ...]:
    if key == ("scheduler", "params"):  # "auto", as Trainer writes it
        return WRONG
    return WRONG_SECTION if section else (*WRONG, *WRONG_TRUTH) if key[-1] in TRUTHS else WRONG


KEYS = list(keys(known_keys()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "ds.json"


def accepts(path: Path, text: str) -> bool:
    """Whether a JSON is accepted; then DeepSpeed takes what it was resolved to."""
    path.write_text(text, encoding="utf-8")
    config = read_config(["--ds_config", str(path), "--model", "m", "--corpus", "c"])
    resolved: list[dict[str, Any]] = []

    def resolve() -> None:
        raw, cpu = load_ds_config(str(path)), torch.device("cpu")
        resolved.append(resolve_ds_config(raw, config, world_size=1, hidden_size=32, device=cpu).ds_config)

    if refusal(resolve) is not None:
        return False
    DeepSpeedConfig(json.loads(json.dumps(resolved[0])))
    return True


@fuzz(2)
@given(data=st.data())
def test_wrong_values(data: st.DataObject, path: Path) -> None:
    for key, section in KEYS:
        value = data.draw(st.sampled_from(wrong(key, section)))
        assert not accepts(path, nested(key, value)), (key, value[:40])


@fuzz(1)
@given(data=st.data())
def test_values_of_other_keys(data: st.DataObject, path: Path) -> None:
    for key, _ in KEYS:
        accepts(path, nested(key, data.draw(st.sampled_from(ANY))))
