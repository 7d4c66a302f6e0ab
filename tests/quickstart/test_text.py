"""The demo's text: what is taken, always in the same order, and what is held out."""

import bz2
import json
from pathlib import Path

import pytest

from dga_scale.errors import UserError
from dga_scale.quickstart.text import Document, docstrings, plain_paragraphs, wikipedia

LONG = "A sentence of documentation that says what this does and why. " * 5


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a side effect on import, which reading it must not have."""
    root = tmp_path / "site" / "speaking_library"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text(f'"""{LONG}module."""\nraise RuntimeError("imported")\n')
    (root / "b.py").write_text(
        f'class C:\n    """{LONG}class."""\n    def f(self):\n        """{LONG}method."""\n'
        '    def g(self):\n        """Short."""\n'
    )
    (root / "a.py").write_text(f'async def h():\n    """{LONG}function é."""\n', encoding="utf-8")
    (root / "old.py").write_text("print 'Python 2'\n")
    (root / "tests" / "test_a.py").write_text(f'"""{LONG}not documentation."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_docstrings_are_read_without_importing_in_order_of_path(library: Path) -> None:
    found = list(docstrings(["speaking_library"]))
    assert [(d.source, d.text.split()[-1]) for d in found] == [
        ("speaking_library/__init__.py", "module."),
        ("speaking_library/a.py", "é."),
        ("speaking_library/b.py", "class."),
        ("speaking_library/b.py", "method."),
    ]


def test_docstrings_of_an_installed_library_are_the_same_each_time() -> None:
    first, second = (list(docstrings(["networkx"])) for _ in range(2))
    assert first == second
    assert len(first) > 1000
    assert all(len(document.text) >= 200 for document in first)


def test_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"package nowhere_to_be_found.*pip install -e \.\[quickstart\]"):
        list(docstrings(["nowhere_to_be_found"]))


def test_held_out_by_source_about_one_in_n() -> None:
    documents = [Document(f"file{i}.py", "x") for i in range(5000)]
    share = sum(d.held_out(40) for d in documents) / len(documents)
    assert share == pytest.approx(1 / 40, rel=0.25)
    assert all(Document(d.source, "other text").held_out(40) == d.held_out(40) for d in documents[:100])


def test_markup_is_taken_off_an_article() -> None:
    wikitext = (
        "{{Infobox person|name={{nowrap|Ada}}|born=1815}}\n"
        "'''Ada Lovelace''' was a [[mathematician|mathematician and writer]] known for her work on the "
        "[[Analytical Engine]].<ref>{{cite book|title=Ada}}</ref> She was the first<!-- or so --> to see "
        "that the machine had uses beyond calculation&nbsp;– and published [http://example.org the first] "
        "algorithm meant for it.<ref name=x /> [[File:Ada.jpg|thumb|A [[portrait]] of her]]\n"
        "* [[List item]] " + "that is long enough to be a paragraph " * 8 + "\n"
        "{| class=table\n| cell " + "long " * 60 + "\n|}\n"
        "== Heading ==\nshort line\n"
    )
    (paragraph,) = plain_paragraphs(wikitext)
    assert paragraph == (
        "Ada Lovelace was a mathematician and writer known for her work on the Analytical Engine. She was "
        "the first to see that the machine had uses beyond calculation – and published the first algorithm "
        "meant for it."
    )


def test_redirects_are_skipped(tmp_path: Path) -> None:
    page = "<page><title>{}</title>{}<revision><text>{}</text></revision></page>"
    xml = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
        + page.format("Gone", '<redirect title="Kept"/>', LONG)
        + page.format("Kept", "", LONG)
        + "</mediawiki>"
    )
    sample = tmp_path / "dump.bz2"
    sample.write_bytes(bz2.compress(xml.encode()))
    assert list(wikipedia(sample)) == [Document("Kept", LONG.strip())]


def test_the_wikipedia_sample_is_running_text() -> None:
    documents = list(wikipedia())
    assert len({d.source for d in documents}) == 97
    text = " ".join(d.text for d in documents)
    assert 2.2e6 < len(text) < 2.6e6
    for markup in ("[[", "{{", "<ref", "'''", "&nbsp;"):
        assert text.count(markup) < 5, markup
    assert json.loads(json.dumps(text)) == text  # no lone surrogates
