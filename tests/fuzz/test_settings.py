"""Every setting of every command, by flag and by YAML, with values that it can't have."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_scale.config.declaration import Setting
from dga_scale.config.methods import METHOD_SETTINGS, known_settings
from dga_scale.config.parsing import read_config
from dga_scale.errors import run_main
from tests.helpers.nonsense import DIGITS, NUMBERS, answer, fuzz

SETTINGS = known_settings()
METHODS = {
    name: next((method for method, own in METHOD_SETTINGS.items() if name in own.__dataclass_fields__), "mlm")
    for name in SETTINGS
}

NOT_OF: dict[type, tuple[str, ...]] = {
    bool: ("", "2", "maybe", "nan", "1e400", DIGITS, "[]", "\x1b[31m"),
    int: (*NUMBERS, "", "x", "1.5", "1e3", "--", "-1", "true", "[]", "{}", "a\nb", "\x1b[31m"),
    float: (*NUMBERS, "", "x", "1,5", "-1", "true", "[]", "{}", "a\nb", "\x1b[31m"),
    str: ("", "a\0b", "\ud800", "x" * 300 + "\0"),
}
"""Values that a setting of a type can't have, as they are typed."""

YAML_NOT_OF: dict[type, tuple[str, ...]] = {
    kind: (*(json.dumps(value) for value in values), "{a: 1}", "[[1]]", "!!binary aGk=", "!!set {a, b}")
    for kind, values in NOT_OF.items()
}
YAML_NOT_OF[int] += (
    ".nan",
    ".inf",
    "2001-02-30",
    "2001-02-03",
    "[1, 2]",
    f"0x{'f' * 5000}",
    "0b" + "1" * 9000,
)
YAML_NOT_OF[float] += tuple(value for value in YAML_NOT_OF[int] if value not in ('"1.5"', '"1e3"'))
YAML_NOT_OF[bool] += (".nan", "3", "[true]", f"0x{'f' * 5000}", "2001-02-03")
YAML_NOT_OF[str] += ("&a [*a]", "!!python/object:os.system {}", '"\\ud800"', '"\\0"')


def wrong_texts(setting: Setting, texts: dict[type, tuple[str, ...]]) -> tuple[str, ...]:
    return (*texts[str], "x", "1", "heads,") if setting.choices else texts[setting.type]


def refused(arguments: list[str]) -> str:
    code, said = answer(lambda: run_main(lambda: read_config(arguments) and 0), [])
    assert code == 2, (arguments, code)
    assert said.startswith("error: "), said
    assert said.count("\n") == 1
    assert said[:-1].isprintable(), said
    return said


def base(name: str) -> list[str]:
    return [] if name == "ds_config" else ["--ds_config", "ds.json"]


def flag_cases() -> list[list[str]]:
    """Arguments of training with a setting that is wrong."""
    return [
        [*base(name), "--method", METHODS[name], f"--{name}={value}"]
        for name, setting in SETTINGS.items()
        for value in wrong_texts(setting, NOT_OF)
    ]


def yaml_cases() -> list[tuple[list[str], str]]:
    """Arguments of training, and a YAML file with a setting that is wrong."""
    return [
        (base(name), f"method: {METHODS[name]}\n{name}: {value}\n")
        for name, setting in SETTINGS.items()
        for value in wrong_texts(setting, YAML_NOT_OF)
    ]


@fuzz(600)
@given(arguments=st.sampled_from(flag_cases()))
def test_flags(arguments: list[str]) -> None:
    refused(arguments)


@fuzz(800)
@given(case=st.sampled_from(yaml_cases()))
def test_yaml(case: tuple[list[str], str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "nonsense.yaml"
    path.write_text(case[1], encoding="utf-8")
    refused([*case[0], f"--config={path}"])
