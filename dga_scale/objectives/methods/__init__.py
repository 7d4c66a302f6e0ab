"""The methods: one file a method, and a registry that finds them.

A method has two files of one name: its settings in ``config/methods/NAME.py``, which ``--help`` reads, and
the method here in ``NAME.py``, which is imported when it is asked for, as it imports torch.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dga_scale.config import methods as declarations
from dga_scale.config.settings import TrainConfig

if TYPE_CHECKING:
    from dga_scale.objectives.method import Method


class _Methods(Mapping[str, "type[Method[Any]]"]):
    """The methods by the names that ``--method`` takes; a method's file is imported on first use."""

    def __init__(self) -> None:
        self._loaded: dict[str, type[Method[Any]]] = {}

    def __getitem__(self, name: str) -> "type[Method[Any]]":
        if name not in self._loaded:
            self._loaded[name] = _load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(declarations.METHOD_SETTINGS)

    def __len__(self) -> int:
        return len(declarations.METHOD_SETTINGS)

    def register(self, method: "type[Method[Any]]") -> None:
        """Add a method that lies outside of this package, under the name that its settings give."""
        declarations.register(method.Settings)
        self._loaded[method.Settings.name] = method


METHODS = _Methods()


def build_method(config: TrainConfig) -> "Method[Any]":
    """Make the objective that the settings name."""
    return METHODS[config.method_name](config.method)


def _load(name: str) -> "type[Method[Any]]":
    from dga_scale.objectives.method import Method

    module = importlib.import_module(f"{__name__}.{name}")
    (method,) = (
        found
        for found in vars(module).values()
        if inspect.isclass(found) and issubclass(found, Method) and found.__module__ == module.__name__
    )
    assert method.Settings is declarations.METHOD_SETTINGS[name], f"{method} has other settings than {name}"
    return method
