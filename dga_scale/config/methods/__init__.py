"""The registry of methods' names and settings: one file a method, found without torch.

``objectives.methods`` holds the method itself in a file of the same name, which is imported when it is asked
for: printing help and refusing a flag need the declarations alone.
"""

import importlib
import pkgutil
from collections.abc import Iterator

from dga_scale.config.declaration import Setting, declared
from dga_scale.config.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
)

DEFAULT = "dga"


def register(settings: type[MethodSettings]) -> None:
    """Add the settings of a method outside of this package; ``objectives.METHODS.register`` calls it."""
    known = METHOD_SETTINGS.setdefault(settings.name, settings)
    assert known is settings, f"there is a method {settings.name!r} already: {known}"


def _subclasses(of: type[MethodSettings]) -> Iterator[type[MethodSettings]]:
    for subclass in of.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _found() -> dict[str, type[MethodSettings]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    # Classes without a name of their own are what several methods share.
    named = [each for each in _subclasses(MethodSettings) if "name" in vars(each)]
    own = [each for each in named if each.__module__.startswith(f"{__name__}.")]
    return {each.name: each for each in sorted(own, key=lambda each: each.name)}


METHOD_SETTINGS: dict[str, type[MethodSettings]] = _found()
"""By the names that ``--method`` takes."""


def known_settings() -> dict[str, Setting]:
    """Return the settings of all methods by name, but for ``--method`` itself."""
    common = (ModelSettings, DataSettings, OptimizationSettings, RunSettings)
    groups = (*common, *METHOD_SETTINGS.values())
    return {each.name: each for group in groups for each in declared(group)}
