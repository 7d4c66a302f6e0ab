"""Numbers and empty values of flags, the same for every command."""

import argparse
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dga_scale.config.arguments import Parser, number, whole_number
from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.mixture import parse_mix
from dga_scale.errors import UserError

NO_NUMBERS = ["", " 5", "5 ", "1_000", "²", "\u0663", "\uff11\uff12", "0x10", "five", "1e3.5", "--5"]
COMMANDS = {
    entry.name: entry
    for entry in metadata.entry_points(group="console_scripts")
    if entry.name.startswith("dga-")
}


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1.0", "1e3", "nan", "9" * 4001])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        whole_number(text)


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1e", ".", "1,5"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        number(text)


@pytest.mark.parametrize("text", ["0", "12", "-3", "+5", "007", "9" * 300])
def test_whole_numbers_are_pythons(text: str) -> None:
    assert whole_number(text) == int(text)


@pytest.mark.parametrize("text", ["0", "1.", ".5", "-2.5e-3", "1E4", "1e-4", "inf"])
def test_numbers_are_pythons(text: str) -> None:
    assert number(text) == float(text)


def test_a_setting_a_mixture_and_an_array_task_take_the_same_digits() -> None:
    with pytest.raises(UserError, match="--max_steps: '1_000' is not a whole number"):
        read_config(["--max_steps", "1_000"])
    with pytest.raises(UserError, match="--learning_rate: '\uff11e-4' is not a number"):
        read_config(["--learning_rate", "\uff11e-4"])
    with pytest.raises(UserError, match="not of the form PATH:SHARE"):
        parse_mix("general:0.0_5")
    with pytest.raises(UserError, match="'\u0660/\u0668' is not of the form i/N"):
        parse_mixed_task("\u0660/\u0668")
    assert parse_mixed_task("0/8") == (0, 8)


def parse_mixed_task(text: str) -> tuple[int, int]:
    from dga_scale.corpus.options import build_parser

    words = ["text", "--tokenizer", "model", "--output", "out", "--array_task", text]
    found: tuple[int, int] = build_parser().parse_args(words).array_task
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_with_an_empty_value_is_refused_by_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an unset variable of a script gives: ``--output "$OUT"``."""
    flags: list[str] = []

    def note(parser: Parser, words: list[str]) -> None:
        flags.extend(flag for flag in parser.flags() if flag != "--help")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "refuse_doubled_flags", note)
        patch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit):
            COMMANDS[command].load()()
    flag = flags[0] if flags else "--output_dir"
    for words in ([flag, ""], [f"{flag}="]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [command, *words])
            with pytest.raises(SystemExit) as ended:
                COMMANDS[command].load()()
        assert ended.value.code == 2
        assert f"error: {flag} '': is empty. Give a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [("model: ''", "model is '', and must be text that is not empty"),
     ("save_steps: '1_0'", "save_steps is '1_0', and must be a whole number")],
)  # fmt: skip
def test_a_setting_of_a_file_is_refused_with_its_line(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"max_steps: 3\n{line}\n")
    with pytest.raises(UserError, match=f"run.yaml:2: {words}"):
        read_config(["--config", str(file)])
