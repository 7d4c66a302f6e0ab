"""docs/settings.md is what the declarations say."""

from dga_scale.config.methods import known_settings
from dga_scale.config.page import page
from tests.helpers.ranks import REPOSITORY


def test_the_page_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "run `make docs`"


def test_there_is_one_section_of_each_title() -> None:
    titles = [line for line in page().splitlines() if line.startswith("#")]
    assert len(titles) == len(set(titles)) > 20
    assert "### `das`" in titles
    assert "### `ewc`" in titles


def test_every_setting_stands_there_once_for_each_default() -> None:
    lines = page().splitlines()
    for each in known_settings().values():
        found = [line for line in lines if line.startswith(f"| `{each.name}` |")]
        assert len(found) == (2 if each.name == "protect" else 1)  # DAS has a default of its own
        assert all(f"| {each.affects}" in line for line in found)
        assert any(each.source in line.replace("\\", "") for line in found)
