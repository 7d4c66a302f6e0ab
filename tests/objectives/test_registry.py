"""Methods are found by their files' names, and one outside of the package makes itself known."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from dga_scale.config.declaration import AT_LEAST_0, setting
from dga_scale.config.methods import METHOD_SETTINGS
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import MethodSettings
from dga_scale.errors import UserError
from dga_scale.objectives import methods
from dga_scale.objectives.method import Method
from dga_scale.objectives.methods import METHODS, build_method


@dataclass(frozen=True)
class OutsideSettings(MethodSettings):
    """Of a method that this test declares."""

    name: ClassVar = "outside"
    summary: ClassVar = "a method of somebody else"

    outside_weight: float = setting(1.0, "Weight of its loss.", rule=AT_LEAST_0)


class Outside(Method[OutsideSettings]):
    """The LM loss alone."""

    Settings = OutsideSettings


@pytest.fixture
def outside() -> Iterator[None]:
    METHODS.register(Outside)
    yield
    del METHOD_SETTINGS["outside"]


def test_each_file_is_a_method_with_its_settings() -> None:
    files = {path.stem for path in Path(methods.__path__[0]).glob("*.py")} - {"__init__"}
    assert set(METHODS) == files
    for name, method in METHODS.items():
        assert method.Settings is METHOD_SETTINGS[name]
        assert method.Settings.name == name
        assert method(method.Settings()).name == name


def test_a_method_outside_of_the_package_is_chosen_by_its_name(outside: None) -> None:
    config = read_config(["--ds_config=x.json", "--method=outside", "--outside_weight=0.5"])
    method = build_method(config)
    assert isinstance(method, Outside)
    assert method.settings.outside_weight == 0.5
    assert config.as_dict()["method"] == "outside"
    with pytest.raises(UserError, match="--outside_weight is a setting of --method outside"):
        read_config(["--ds_config=x.json", "--method=mlm", "--outside_weight=0.5"])
    with pytest.raises(UserError, match="outside_weight -1"):
        read_config(["--ds_config=x.json", "--method=outside", "--outside_weight=-1"])
