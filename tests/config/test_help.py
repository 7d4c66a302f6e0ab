"""What ``--help`` says is made of whole sentences, and a flag that no command knows has the nearest one."""

import re
import sys
from importlib import metadata

import pytest

from dga_scale.config.methods import METHOD_SETTINGS, known_settings
from dga_scale.config.parsing import build_parser

COMMANDS = {
    entry.name: entry
    for entry in metadata.entry_points(group="console_scripts")
    if entry.name.startswith("dga-")
}
STRAY = re.compile(r"(?<!\.)\.\.(?!\.)|(?<!et al)(?<!\.)[.,;:] ?[,;:]|[,;:] \.(?![.\w])|\( *\)|\b(\w+) \1\b")
"""Two full stops, other marks side by side, an empty bracket, a word twice."""
NEEDED = {"dga-plan": ["--gpus", "8", "--gpu", "h100"]}
"""What a command asks for before it looks at the flags that it passes on."""


def called(command: str, *words: str) -> int:
    """Call a command in this process; return its exit code."""
    main = COMMANDS[command].load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def strays(text: str) -> list[str]:
    joined = " ".join(text.split())
    return [joined[max(0, found.start() - 30) : found.end() + 10] for found in STRAY.finditer(joined)]


@pytest.mark.parametrize("name", known_settings())
def test_the_help_of_a_setting_is_sentences(name: str) -> None:
    each = known_settings()[name]
    assert each.help.endswith("."), each.help
    assert re.match(r"[A-Z0-9]", each.help), each.help


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_nothing_stray_in_the_help_of_a_method(method: str) -> None:
    assert strays(build_parser(method).format_help()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_stray_in_the_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(command, "--help") == 0
    assert strays(capsys.readouterr().out) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_has_the_nearest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    called(command, "--help")
    flag = max(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.M), key=len)
    assert called(command, *NEEDED.get(command, []), f"{flag}x", "1") == 2
    assert re.search(rf"Did you mean (--)?{flag[2:]}\?", capsys.readouterr().err)
