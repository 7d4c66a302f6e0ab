"""docs/settings.md is what the declarations say."""

from dga_scale.config.methods import known_settings
from dga_scale.config.page import page
from tests.helpers.ranks import REPOSITORY


def test_the_page_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "run `make docs`"


def test_every_setting_stands_there_once() -> None:
    lines = page().splitlines()
    for each in known_settings().values():
        (line,) = (line for line in lines if line.startswith(f"| `{each.name}` |"))
        assert f"| {each.affects}" in line
        assert each.source in line.replace("\\", "")
