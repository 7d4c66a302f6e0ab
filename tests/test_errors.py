"""What a message shows of names and addresses that it quotes."""

import pytest

from dga_scale.errors import UserError, one_line, run_main


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file a.txt: \u8a9e caf\xe9 \xa0\u3000.", "no file a.txt: \u8a9e caf\xe9 \xa0\u3000."),
        ("red \x1b[31m\nnext\r", "red \\x1b[31m\\nnext\\r"),
        ("byte \udce9, turned \u202e", "byte \\udce9, turned \\u202e"),
        ("at https://me:pw@host/x", "at https://***@host/x"),
    ],
)
def test_one_line(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(text) == shown

    def mistake() -> None:
        raise UserError(text)

    with pytest.raises(SystemExit, match="2"):
        run_main(mistake)
    assert capsys.readouterr().err == f"error: {shown}\n"
