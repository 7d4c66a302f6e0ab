"""A run folder is resumed by settings that mean what they meant, however they are written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dga_scale.config.comparison import experiment
from dga_scale.config.declaration import Setting
from dga_scale.config.methods import METHOD_SETTINGS, known_settings
from dga_scale.config.parsing import read_config
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.run_folder import RunFolder
from tests.helpers.small import SmallWorld, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def config_of(method: str = "dga", **settings: object) -> TrainConfig:
    values = {"ds_config": "ds.json", "model": "some/model", "corpus": "corpus", "method": method, **settings}
    return read_config([f"--{name}={value}" for name, value in values.items()])


def folder_of(path: Path, config: TrainConfig) -> RunFolder:
    folder = RunFolder(path)
    folder.write_config(config)
    folder.log.write_text('{"event": "evaluation", "step": 0}\n')
    return folder


def another(each: Setting, value: Any) -> Any:
    """Some other value that the setting may have."""
    if each.choices:
        other = next(choice for choice in each.choices if value not in (choice, [choice]))
        return [other] if each.is_list else other
    if each.type is bool:
        return not value
    if each.type is str:
        return [f"{value}2"] if each.is_list else f"{value}2"
    return 0.375 if value != 0.375 and each.type is float else (value or 0) + 1


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_file_written_before_a_setting_existed_resumes(method: str, tmp_path: Path) -> None:
    config = config_of(method)
    folder = folder_of(tmp_path, config)
    given = {"model", "corpus"}  # these have no default that a run could have had
    for name in config.as_dict().keys() - given:
        if name == "method" and method != "dga":
            continue
        older = {key: value for key, value in config.as_dict().items() if key != name}
        folder.config.write_text(yaml.safe_dump(older))
        folder.check(config)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_an_absent_setting_counts_as_its_default_and_no_other_value(method: str, tmp_path: Path) -> None:
    config = config_of(method)
    folder = folder_of(tmp_path, config)
    own = [each for each in config.settings() if each.affects == "numbers" and each.refers is None]
    for each in own:
        older = {key: value for key, value in config.as_dict().items() if key != each.name}
        folder.config.write_text(yaml.safe_dump(older))
        with pytest.raises(UserError, match=f"{each.name} was"):
            folder.check(config.replace(**{each.name: another(each, each.default)}))


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_what_a_setting_affects_decides_whether_it_may_change(method: str, tmp_path: Path) -> None:
    config = config_of(method)
    folder = folder_of(tmp_path, config)
    seen = set()
    for each in config.settings():
        seen.add(each.affects)
        changed = config.replace(**{each.name: another(each, config.as_dict()[each.name])})
        if each.affects == "numbers":
            with pytest.raises(UserError, match=f"holds another run: {each.name} was"):
                folder.check(changed)
            folder.check(changed, allowed=lambda difference, name=each.name: difference.name == name)
        else:
            folder.check(changed)
        same = experiment(changed.as_dict()) == experiment(config.as_dict())
        assert same == (each.affects in ("speed", "place") or each.name == "seed")
    assert seen == {"numbers", "evaluation", "speed", "place"}


@pytest.mark.parametrize(
    ("method", "name", "given", "reordered", "other"),
    [
        ("dga", "protect", ["heads", "ffn_output"], ["ffn_output", "heads"], ["ffn_output"]),
        ("lora", "lora_targets", ["query", "up"], ["up", "query"], ["up", "down"]),
    ],
)
def test_the_order_of_names_is_no_change(
    method: str, name: str, given: list[str], reordered: list[str], other: list[str], tmp_path: Path
) -> None:
    config = config_of(method).replace(**{name: given})
    folder = folder_of(tmp_path, config)
    same, changed = config.replace(**{name: reordered}), config.replace(**{name: other})
    folder.check(same)
    with pytest.raises(UserError, match=f"{name} was"):
        folder.check(changed)
    assert experiment(same.as_dict()) == experiment(config.as_dict()) != experiment(changed.as_dict())


def test_another_method_is_named_and_not_its_settings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config_of("dga"))
    with pytest.raises(UserError, match=r"another run: method was 'dga', is 'mlm'\. Give"):
        folder.check(config_of("mlm"))


def test_a_setting_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config_of())
    folder.config.write_text(folder.config.read_text() + "gravity: 9.81\n")
    with pytest.raises(UserError, match=r"gravity was 9\.81, which is no setting of this version"):
        folder.check(config_of())


def linked(path: Path) -> Path:
    link = path.with_name(f"{path.name}-link")
    link.symlink_to(path)
    return link


SPELLINGS: dict[str, Callable[[Path], object]] = {
    "as it was": lambda path: path,
    "a slash behind it": lambda path: f"{path}/",
    "up and down again": lambda path: path / ".." / path.name,
    "relative": lambda path: os.path.relpath(path),
    "a link": linked,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_paths_are_what_they_point_to(spelling: str, world: SmallWorld, tmp_path: Path) -> None:
    model, corpus, general = (
        shutil.copytree(source, tmp_path / name)
        for source, name in ((world.model, "m"), (world.corpus, "c"), (world.general_corpus, "g"))
    )
    # Without manifests, so that nothing but the path can say that it is the same.
    for text in (corpus, general):
        (text / "manifest.json").unlink()
    folder = folder_of(tmp_path / "run", config_of(model=model, corpus=corpus, mix=f"{general}:0.25"))
    said = SPELLINGS[spelling]
    model, corpus, general = said(model), said(corpus), said(general)
    folder.check(config_of(model=model, corpus=corpus, mix=f"{general}:0.25"))
    with pytest.raises(UserError, match="mix was"):
        folder.check(config_of(model=model, corpus=corpus, mix=f"{general}:0.5"))
    with pytest.raises(UserError, match="corpus was"):
        folder.check(config_of(model=model, corpus=general, mix=f"{general}:0.25"))


def test_a_corpus_on_another_mount_is_known_by_its_content(world: SmallWorld, tmp_path: Path) -> None:
    here = shutil.copytree(world.corpus, tmp_path / "one" / "corpus")
    there = shutil.copytree(world.corpus, tmp_path / "two" / "text")
    folder = folder_of(tmp_path / "run", config_of(corpus=here))
    folder.check(config_of(corpus=there))
    with pytest.raises(UserError, match="corpus was"):
        folder.check(config_of(corpus=world.general_corpus))
    shutil.rmtree(here)  # the old mount is gone: the folder remembers what lay there
    folder.check(config_of(corpus=there))
    with pytest.raises(UserError, match="corpus was"):
        folder.check(config_of(corpus=world.general_corpus))


def test_files_are_what_they_hold(tmp_path: Path) -> None:
    for name, content in (("a", b"importance"), ("b", b"importance"), ("c", b"another")):
        (tmp_path / name).write_bytes(content)
    folder = folder_of(tmp_path / "run", config_of("das", prior_importance=tmp_path / "a"))
    folder.check(config_of("das", prior_importance=tmp_path / "b"))
    with pytest.raises(UserError, match="prior_importance was"):
        folder.check(config_of("das", prior_importance=tmp_path / "c"))


def test_every_default_satisfies_its_own_declaration() -> None:
    for each in known_settings().values():
        if each.default is None:
            continue
        values = each.default if each.is_list else [each.default]
        assert all(isinstance(value, each.type) for value in values), each.name
        assert not each.choices or set(values) <= set(each.choices), each.name
        assert each.rule is None or each.rule.holds(each.default), each.name
        assert each.help.endswith("."), each.name


def test_a_run_that_was_refused_before_it_began_may_start_with_other_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config_of())
    folder.log.write_text("")
    folder.check(config_of(learning_rate=0.5))
    folder.log.write_text('{"event": "evaluation", "step": 0}\n')
    with pytest.raises(UserError, match="holds another run: learning_rate was"):
        folder.check(config_of(learning_rate=0.5))
