"""What is learnt: one file a method, one registry, which finds them."""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence

from dga_scale.config.parsing import MethodEntry, parse_config
from dga_scale.config.settings import TrainConfig
from dga_scale.objectives.method import Method


def _subclasses(of: type[Method]) -> Iterator[type[Method]]:
    for subclass in of.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _found() -> dict[str, type[Method]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    own = [method for method in _subclasses(Method) if method.__module__.startswith(f"{__name__}.")]
    return {method.name: method for method in sorted(own, key=lambda method: method.name)}


METHODS: dict[str, type[Method]] = _found()
"""The names that ``--method`` takes."""


def build_method(config: TrainConfig) -> Method:
    """Make the objective that the settings name."""
    return METHODS[config.method_name](config.method)


def read_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Settings of a run from its command line and YAML file; see ``parsing.parse_config``."""
    entries = {name: MethodEntry(method.summary, method.Settings) for name, method in METHODS.items()}
    return parse_config(entries, arguments)
