"""Code of the user: what it registers is there, and what is wrong with it is said in one line."""

import sys
from pathlib import Path

import pytest

from dga_scale.config.arguments import Parser
from dga_scale.config.parsing import read_config
from dga_scale.config.user_code import code_hashes, import_code, imported
from dga_scale.errors import UserError
from tests.helpers.flags import changed

FLAGS = ["--model", "m", "--corpus", "c", "--ds_config", "zero2.json"]


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        import_code([name])
    message = str(caught.value)
    assert "\n" not in message
    assert name not in imported()
    return message


def test_a_file_is_run_once(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import sys\nsys.runs_of_own = getattr(sys, 'runs_of_own', 0) + 1\n")
    import_code([str(file)])
    import_code([str(file)])
    assert sys.__dict__.pop("runs_of_own") == 1
    assert str(file) in imported()
    before = code_hashes()[str(file)]
    file.write_text("another = True\n")
    assert code_hashes()[str(file)] != before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1\ny = = 2\n", "own.py:2: SyntaxError: invalid syntax"),
        ("def broken():\n    return 1 / 0\n\n\nbroken()\n", "own.py:2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "own.py:2: JSONDecodeError: Expecting"),
        ("import no_such_module_of_a_test\n", "own.py:1: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)\n", "own.py:1: SystemExit: 3"),
        ("x = '\udcff'\n", "SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_bytes(content.encode(errors="surrogateescape"))
    message = refusal(str(file))
    assert message.startswith(f"--import {file}: ")
    assert words in message


def test_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "package_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "good.py").write_text("VALUE = 3\n")
    (package / "bad.py").write_text("\nimport no_such_module_of_a_test\n")
    import_code(["package_of_a_test.good"])
    assert sys.modules["package_of_a_test.good"].VALUE == 3
    assert "bad.py:2: ModuleNotFoundError" in refusal("package_of_a_test.bad")
    assert "finds no module 'package_of_a_test.none'" in refusal("package_of_a_test.none")
    assert "finds no module 'none_of_a_test'" in refusal("none_of_a_test.there")
    assert "no such Python file" in refusal(str(tmp_path / "none.py"))
    (tmp_path / "text").touch()
    assert "no such Python file" in refusal(str(tmp_path / "text"))


def test_it_is_a_setting(tmp_path: Path) -> None:
    config = read_config([*FLAGS, "--import", "a.py", "b.c"])
    assert config.model.import_ == config.as_dict()["import"] == ["a.py", "b.c"]
    assert config.replace(**{"import": None}).model.import_ is None
    yaml = tmp_path / "run.yaml"
    yaml.write_text("import: [a.py]\n")
    assert read_config([*FLAGS, "--config", str(yaml)]).as_dict()["import"] == ["a.py"]
    assert read_config(changed(FLAGS)).as_dict()["import"] is None


def test_it_is_an_option_of_other_commands(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import sys\nsys.own_was_here = True\n")
    parser = Parser()
    parser.add_import()
    assert parser.run(lambda options: int(sys.own_was_here), ["--import", str(file)]) == 1
    del sys.own_was_here
