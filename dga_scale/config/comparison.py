"""The comparison of two runs' settings by what they mean: a folder's config.yaml and a command line.

A setting that an older file does not name has its default there, as it was when there was no other value. A
path is compared by what it points to: ``corpora/acl``, ``corpora/acl/``, ``runs/../corpora/acl``, the
absolute path and a symbolic link are one corpus, and so is a copy on another mount.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dga_scale.config.declaration import Refers, Setting
from dga_scale.config.methods import known_settings
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import GivenPath

ContentHash = Callable[[str], str | None]
"""A function that returns the content hash of a folder's corpus; None where there is none."""


class Difference(NamedTuple):
    """A setting whose values mean different things."""

    name: str
    former: Any
    now: Any
    known: bool = True
    """Whether a setting has the name."""

    def __str__(self) -> str:
        """Format the difference for a message: ``max_steps was 100, is 200``."""
        if not self.known:
            return (
                f"{self.name} was {self.former!r}, which is no setting of this version (take its line out of "
                "the folder's config.yaml)"
            )
        return f"{self.name} was {self.former!r}, is {self.now!r}"


def differences(
    former: Mapping[str, Any],
    config: TrainConfig,
    former_hash: ContentHash,
    current_hash: ContentHash,
) -> list[Difference]:
    """List the settings that decide the numbers and differ from the former run's.

    Args:
        former: The run's flat settings, as ``TrainConfig.as_dict`` gave them to its config.yaml.
        config: The settings asked for now.
        former_hash: The content hash of a corpus that ``former`` names.
        current_hash: The content hash of a corpus that ``config`` names.

    Returns:
        The differences, in the order of the settings. A name that no setting has now differs too: its value
        may have mattered.

    """
    flat = config.as_dict()
    if former.get("method", flat["method"]) != flat["method"]:
        return [Difference("method", former["method"], flat["method"])]  # their settings have other names
    found = []
    for each in config.settings():
        was, now = former.get(each.name, each.default), flat[each.name]
        if each.affects == "numbers" and not _same(each, was, now, former_hash, current_hash):
            found.append(Difference(each.name, was, now))
    unknown = [name for name in former if name not in flat]
    return found + [Difference(name, former[name], None, known=False) for name in unknown]


def experiment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a run's flat settings to those that make it another experiment than one without them.

    Left out are the seed, the settings that change no numbers, and those at their default, which an older
    file may not name. Paths are absolute, and names of a table in one order.
    """
    known = known_settings()
    found = {}
    for name, value in settings.items():
        each = known.get(name)
        if each is None:
            found[name] = value
        elif not each.same_experiment and not _equal(each, value, each.default):
            found[name] = _absolute(value, each.refers) if each.refers else _ordered(each, value)
    return found


def _ordered(each: Setting, value: Any) -> Any:
    """Put a value that is a set of names into one order, whatever order they were given in."""
    return sorted(set(value)) if each.is_set and value is not None else value


def _equal(each: Setting, one: Any, other: Any) -> bool:
    return bool(_ordered(each, one) == _ordered(each, other))


def _absolute(value: Any, refers: Refers) -> list[str]:
    parts = (split_reference(text, refers) for text in _texts(value))
    return [before + str(Path(path).resolve()) + behind for before, path, behind in parts]


def corpora_of(config: TrainConfig) -> list[str]:
    """List the corpus folders that the settings name, in their order."""
    return [given.path for each, given in _references(config) if "corpus" in str(each.refers)]


def given_paths(config: TrainConfig) -> list[GivenPath]:
    """List the paths and names of models that the settings refer to, with their flags."""
    return [given for _, given in _references(config)]


def _references(config: TrainConfig) -> Iterator[tuple[Setting, GivenPath]]:
    flat = config.as_dict()
    for each in config.settings():
        if each.refers is not None and flat[each.name] is not None:
            for text in _texts(flat[each.name]):
                yield each, GivenPath(f"--{each.name}", text, split_reference(text, each.refers)[1])


def split_reference(text: str, refers: Refers) -> tuple[str, str, str]:
    """Split a setting's text into the path or name that it refers to, and the text before and behind it.

    ``corpora/general:0.05`` with ``corpus:share`` -> ``("", "corpora/general", ":0.05")``.
    """
    if refers == "corpus:share":
        path, colon, share = text.rpartition(":")
        return "", path, colon + share
    if refers == "name=corpus":
        name, equals, path = text.partition("=")
        return name + equals, path, ""
    return "", text, ""


def _same(each: Setting, was: Any, now: Any, former_hash: ContentHash, current_hash: ContentHash) -> bool:
    if each.refers is None or was is None or now is None:
        return _equal(each, was, now)
    ones, others = _texts(was), _texts(now)
    return len(ones) == len(others) and all(
        _same_reference(each.refers, one, other, former_hash, current_hash)
        for one, other in zip(ones, others, strict=True)
    )


def _same_reference(
    refers: Refers, was: str, now: str, former_hash: ContentHash, current_hash: ContentHash
) -> bool:
    before, one, behind = split_reference(was, refers)
    before_now, other, behind_now = split_reference(now, refers)
    if (before, behind) != (before_now, behind_now):
        return False
    if one == other:
        return True
    # A hub's name resolves to a path too, which is another one than any folder's.
    if Path(one).resolve() == Path(other).resolve():
        return True
    if "corpus" in refers:
        known = former_hash(one)
        return known is not None and known == current_hash(other)
    return refers == "file" and _same_bytes(Path(one), Path(other))


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _texts(value: Any) -> Sequence[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
