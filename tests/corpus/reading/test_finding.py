"""What inputs name is found, or told, or refused before anything is read."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from dga_scale.corpus.reading.finding import find_sources
from dga_scale.errors import UserError
from dga_scale.storage.atomic import write_json
from tests.corpus.reading.test_sources import DOCUMENTS, as_txt, read

CYRILLIC = "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440\n\u0434\u0432\u0430\n"


def test_order_hidden_files_and_repeats(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/9.txt", ".hidden/0.txt", "a/.swp.txt", "a/notes.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/9.txt", "b/1.txt", "b/2.txt"]
    assert read(tmp_path / "b", tmp_path) == ["b/1.txt", "b/2.txt", "a/9.txt"]
    assert read(f"{tmp_path}/**/*.txt") == ["a/9.txt", "b/1.txt", "b/2.txt"]


def test_a_pattern_in_a_folder_whose_name_looks_like_one(tmp_path: Path) -> None:
    for name in ("texts [1]/b/1.txt", "texts [1]/c/2.txt", "texts 1/b/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(f"{tmp_path}/texts [1]/[bc]/*.txt") == ["texts [1]/b/1.txt", "texts [1]/c/2.txt"]
    assert read(f"{tmp_path}/texts ?/*/*.txt") == ["texts 1/b/3.txt"]


def test_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.txt: no such file or folder"):
        find_sources([str(tmp_path / "nothing.txt")])
    with pytest.raises(UserError, match=r"\*\.gz: pattern matches no file"):
        find_sources([str(tmp_path / "*.gz")])
    with pytest.raises(UserError, match=r"no text files in the folder \(searched for \.txt"):
        find_sources([str(tmp_path)])


def test_empty_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among others, as Spark leaves them, they are skipped; named, they are a mistake."""
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt is empty \(0 bytes\)"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is empty once decompressed"):
        read(tmp_path / "b.jsonl.gz")
    with pytest.raises(UserError, match=r"no text in .*: 2 empty \(.*a\.txt, .*b\.jsonl\.gz\)"):
        read(tmp_path)
    as_txt(tmp_path / "c.txt")
    for inputs in (tmp_path, tmp_path / "*"):
        assert read(inputs) == DOCUMENTS
        assert "note: not read: 2 empty" in capsys.readouterr().err


def test_what_a_folder_holds_is_read_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "d", tmp_path / "e"
    (folder / "AA").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "a.txt").write_text("read")
    (folder / "AA" / "wiki_00").write_text("left out")
    (folder / ".swp.txt").write_text("left out")
    (elsewhere / "x.txt").write_text("linked")
    (folder / "more").symlink_to("../e")
    (elsewhere / "back").symlink_to("../d")  # a loop
    (folder / "begun" / ".sharding").mkdir(parents=True)
    (folder / "begun" / "data-00000.arrow").write_text("")
    assert read(folder) == ["read", "linked"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: not read: 1 of another ending than .txt")
    for path in ("AA/wiki_00", ".swp.txt", "begun"):
        assert str(folder / path) in line
    (folder / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(
        UserError, match=r"gone\.txt in input folder .* is a link to nowhere\.txt, which is not"
    ):
        read(folder)
    with pytest.raises(UserError, match=r"gone\.txt: a link to nowhere\.txt, which is not there"):
        read(folder / "gone.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_can_not_be_entered(tmp_path: Path) -> None:
    as_txt(tmp_path / "a.txt")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"closed can't be entered: Permission denied"):
        read(tmp_path)


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or a device"):
        read(tmp_path / "pipe.txt")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"a\.tar\.gz is an archive. Unpack it first"):
        read(tmp_path / "a.tar.gz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt can't be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "name", "text"),
    [
        ("utf-16", "has the mark of UTF-16", "text"),
        ("utf-32", "has the mark of UTF-32", "text"),
        ("utf-16-le", "zero bytes stand where UTF-16LE has them", CYRILLIC),
        ("utf-16-be", "zero bytes stand where UTF-16BE has them", CYRILLIC),
        ("utf-16-le", "zero bytes stand where UTF-16LE has them", "ok\n"),
        ("utf-32-le", "zero bytes stand where UTF-32LE has them", CYRILLIC),
        ("utf-32-be", "zero bytes stand where UTF-32BE has them", CYRILLIC),
    ],
)
def test_another_encoding_is_named(encoding: str, name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8: .*{name}.*: iconv -f UTF-\d\d") as error:
        read(tmp_path, whole_files=True)
    command = str(error.value).partition("first: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "utf8-a.txt").read_text(encoding="utf-8").lstrip("\ufeff") == text


def test_zero_bytes_in_utf8_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b\n")
    (tmp_path / "b.txt").write_bytes(b"some words\0and more\n" * 9)  # all at even places
    assert read(tmp_path) == ["a\0b", *["some words\0and more"] * 9]


def test_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    seen = set()
    for content in ("abc", "abd", "abcd"):
        path.write_text(content)
        seen.add(find_sources([str(path)])[0].fingerprint)
    assert len(seen) == 3


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("text\n")
    assert read(tmp_path) == ["text"]
    (source,) = find_sources([str(tmp_path)])
    write_json(tmp_path / "plan.json", source.path, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == path
