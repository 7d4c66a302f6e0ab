"""docs/settings.md, written from the declarations: ``python -m dga_scale.config.page > docs/settings.md``."""

from dataclasses import is_dataclass
from typing import Any

from dga_scale.config.declaration import Setting, as_typed, declared, flag_name
from dga_scale.config.methods import DEFAULT, METHOD_SETTINGS
from dga_scale.config.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
)

_HEAD = """\
# Settings of a training run

Written by `make docs` from the declarations in `dga_scale/config`; a test keeps it up to date. Each setting
is a flag of `launchers/dga_train.py` (`--max_steps 100`) and a line of the YAML file that `--config` names
(`max_steps: 100`); flags win. Several values stand side by side: `--mix a/:0.1 b/:0.2`. A flag without a
value switches a setting of the kind true or false on.

**Affects** says where a setting has to be equal:

- **numbers**: what is trained. A run resumes with the same value only; other values are another experiment.
- **evaluation**: only what is measured. A run may resume with another value; figures can't be compared then.
- **speed**: time and memory. The numbers are equal up to rounding; a run may resume with another value.
- **place**: where things lie, and what a run says, saves and watches on its way. As for speed; a model card
  leaves it out.

All ranks of a run have the same settings. A setting that an older `config.yaml` does not name counts as its
default there. Paths are compared by what they point to, corpora by their content.
"""


def page() -> str:
    """Write the page's whole text."""
    parts = [_HEAD]
    for common in (ModelSettings, DataSettings, OptimizationSettings, RunSettings):
        parts += _section(f"## {common.__name__.removesuffix('Settings')}", [common])
    parts += [
        "## Methods",
        "",
        f"`--method NAME` chooses one; the default is `{DEFAULT}`. A setting of another method is refused.",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| `{name}` | {_cell(settings.summary)} |" for name, settings in METHOD_SETTINGS.items()),
        "",
    ]
    for users, groups in _by_users().items():
        parts += _section(f"### {', '.join(f'`{name}`' for name in users)}", groups)
    return "\n".join(parts)


def _by_users() -> dict[tuple[str, ...], list[type[MethodSettings]]]:
    """Return the classes that declare methods' settings by the methods that have them, most shared first."""
    found: dict[tuple[str, ...], list[type[MethodSettings]]] = {}
    for group in dict.fromkeys(base for each in METHOD_SETTINGS.values() for base in each.__mro__):
        if _own(group):
            users = tuple(name for name, each in METHOD_SETTINGS.items() if issubclass(each, group))
            found.setdefault(users, []).append(group)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _own(group: type[Any]) -> list[Setting]:
    """What a class declares itself, without what it inherits."""
    names = {flag_name(field) for field in vars(group).get("__annotations__", {})}
    return [each for each in declared(group) if each.name in names] if is_dataclass(group) else []


def _section(title: str, groups: list[type[Any]]) -> list[str]:
    rows = [
        f"| `{each.name}` | {_default(each)} | {_values(each)} | {each.affects}"
        f"{', but for repetitions' * each.repeats} | {_cell(each.help)} | {_cell(each.source)} |"
        for group in groups
        for each in _own(group)
    ]
    head = ["| setting | default | values | affects | what it does | source |", "|---|---|---|---|---|---|"]
    return [title, "", " ".join(str(group.__doc__) for group in groups), "", *head, *rows, ""]


def _default(each: Setting) -> str:
    return "" if each.default is None else f"`{as_typed(each.default)}`"


def _values(each: Setting) -> str:
    """Type, rule and choices: ``int, at least 1``, ``gelu, relu or silu``."""
    if each.choices:
        kind = ", ".join(f"`{choice}`" for choice in each.choices)
    elif each.type is bool:
        kind = "`true`, `false`"
    else:
        kind = {int: "whole number", float: "number", str: "text"}[each.type]
    return kind + (f", {each.rule.words}" if each.rule else "") + (", one or several" if each.is_list else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
