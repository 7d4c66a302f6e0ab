"""The declaration of a setting: once, at its field, with all that is known of it.

``--help``, the check of values, the comparison with a run that is resumed, the report's groups, the model
card and docs/settings.md read the declaration; none of them keeps a list of names of its own.
"""

import json
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

Affects = Literal["numbers", "evaluation", "speed", "place"]
"""What a setting has an effect on, which decides where it has to be equal.

numbers
    What is trained. A run resumes with the same value only, and runs with different values are different
    experiments.
evaluation
    Only what is measured: held-out text, and how much of it. A run may resume with another value; runs with
    different values are different experiments, as their figures can't be compared.
speed
    Time and memory. The numbers are equal up to rounding: a run may resume with another value, and such runs
    are the same experiment.
place
    Where things lie, and what a run says, saves and watches on its way. As for speed; a model card
    leaves it out.

Whatever it affects, a setting is equal on all ranks of a run.
"""

Refers = Literal["model", "corpus", "corpus:share", "name=corpus", "file"]
"""The kind of thing that a setting's text refers to; texts that refer to the same are equal (``comparison``).
"""


def as_typed(value: Any) -> str:
    """Write a setting's value as it stands behind its flag; empty for None."""
    if isinstance(value, list):
        return " ".join(map(as_typed, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: Any) -> str:
    """Write a value of a file for a message: its beginning, as it stands in JSON or, of a list, in Python."""
    try:
        text = _BRIEF.repr(value) if isinstance(value, dict | list) else json.dumps(value, default=str)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2


def is_text(text: str) -> bool:
    """Return whether a text can name a file: it has no NUL, and nothing that has no bytes."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class Rule(NamedTuple):
    """A rule that a value must keep: a test, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
AT_LEAST_0 = Rule(lambda value: value >= 0, "0 or more")
ABOVE_0 = Rule(lambda value: value > 0, "above 0")
SHARE = Rule(lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "from 0 to below 1")
INSIDE_0_1 = Rule(lambda value: 0 < value < 1, "between 0 and 1")
ABOVE_0_TO_1 = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")

SEED = Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")

WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}
_KEY = "setting"


def setting(
    default: Any,
    help: str,
    choices: Collection[str] = (),
    *,
    rule: Rule | None = None,
    affects: Affects = "numbers",
    source: str = "",
    refers: Refers | None = None,
    repeats: bool = False,
) -> Any:
    """Declare a setting as a field of a frozen dataclass.

    The field's type is the setting's: ``int``, ``float``, ``str``, ``bool``, ``list[str]``, or one of these
    ``| None`` where None stands for a default that depends on something else.

    Args:
        default: The value without a flag.
        help: The whole sentences for ``--help`` and docs/settings.md.
        choices: The only values it takes, of text; of a table, those that it has when they are read.
        rule: The rule that a number must keep; None is not checked.
        affects: See ``Affects``.
        source: The paper, or its code, that the default or the formula is from.
        refers: The kind of thing that its text refers to, where that is a path or a name.
        repeats: Whether runs that differ in it are repetitions of one experiment (the seed).

    Example::

        lora_rank: int = setting(8, "Rank of the change of a projection.", rule=AT_LEAST_1, source="LoRA")

    """
    declaration = partial(
        Setting,
        default=default,
        help=help,
        choices=choices,
        rule=rule,
        affects=affects,
        source=source,
        refers=refers,
        repeats=repeats,
    )  # the field's name and type are not known yet
    if isinstance(default, list):  # each settings object has its own
        return field(default_factory=lambda: list(default), metadata={_KEY: declaration})
    return field(default=default, metadata={_KEY: declaration})


@dataclass(frozen=True)
class Setting:
    """A setting's declaration: the arguments of ``setting``, and the field's name, type and default.

    Attributes:
        name: The name of the flag.
        type: The type of a value, or of one entry of a list.
        is_list: Whether it takes several values.

    """

    name: str
    type: type
    is_list: bool
    default: Any
    help: str
    choices: Collection[str]
    rule: Rule | None
    affects: Affects
    source: str
    refers: Refers | None
    repeats: bool

    def problem(self, value: Any) -> str | None:
        """Say what a value has to be, wherever it comes from; None where it is, or stands for a default."""
        if value is None:
            return None
        if words := self.wrong_type(value):
            return words
        for each in self._entries(value):
            if self.rule and not self.rule.holds(each):
                return self.rule.words
            if self.choices and each not in self.choices:
                return f"one of {', '.join(self.choices)}"
        return None

    def wrong_type(self, value: Any) -> str | None:
        """Say what kind of value it has to be, whatever the rule and the choices; None where it is that."""
        if value is None:
            return None
        kinds: tuple[Any, ...] = (int, float) if self.type is float else (self.type,)
        for each in self._entries(value):
            if not isinstance(each, kinds) or isinstance(each, bool) != (self.type is bool):
                return WORDS[self.type]
            if each == "":
                return "text that is not empty"
            if isinstance(each, str) and not is_text(each):
                return "text, without NUL or halves of characters"
            if self.type is float and not abs(each) <= sys.float_info.max:
                return "a finite number"
            if self.type is int and not abs(each) < 2**63:
                return "a number below 2^63"
        return None

    def _entries(self, value: Any) -> list[Any]:
        return value if self.is_list and isinstance(value, list) else [value]

    @property
    def is_set(self) -> bool:
        """Whether the values are names of a table: each is there once, and their order changes nothing."""
        return self.is_list and bool(self.choices)

    @property
    def same_experiment(self) -> bool:
        """Whether runs with different values of the setting are the same experiment."""
        return self.repeats or self.affects in ("speed", "place")


def declared(settings: type[Any]) -> Iterator[Setting]:
    """Read the declarations of a settings class, inherited ones first."""
    types = get_type_hints(settings)
    for each in fields(settings):
        declaration: partial[Setting] = each.metadata[_KEY]
        is_list, kind = _kind(types[each.name])
        yield declaration(name=flag_name(each.name), type=kind, is_list=is_list)


def flag_name(field: str) -> str:
    """Return a field's setting: a field can't be a word of Python's, ``import_`` is ``import``."""
    return field.removesuffix("_")


def _kind(annotation: Any) -> tuple[bool, type]:
    """Return whether a type is a list, and its scalar: ``list[str] | None`` -> (True, str)."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if get_origin(annotation) is list:
        return True, options[0]
    if options:  # of X | None
        (annotation,) = options
        return _kind(annotation)
    return False, annotation
