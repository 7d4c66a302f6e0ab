"""The parts of a page: its style, sections, tables, and figures drawn for light and for dark."""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

from dga_scale.logging import plots

Draw = Callable[[plots.Theme], Figure]
"""Draws a figure for a light or a dark page."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --text: #1f2328; --muted: #59636e;
  --line: #d1d9e0; --accent: #0969da; --better: #1a7f37; --worse: #b35900; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --card: #171d24; --text: #e3e8ee;
  --muted: #9aa5b1; --line: #323a44; --accent: #6cb2ff; --better: #4cc470; --worse: #ffa657; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.muted, td small { color: var(--muted); }
.summary { background: var(--card); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: .4rem 1rem; margin: .8rem 0; }
.summary p { max-width: none; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .4rem .8rem .4rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; }
td small { display: block; font-size: .8rem; white-space: nowrap; }
tr.group td { font-weight: 600; padding-top: 1rem; text-align: left; }
.better { color: var(--better); font-weight: 600; } .worse { color: var(--worse); font-weight: 600; }
.settings td { text-align: left; overflow-wrap: anywhere; max-width: 20rem; }
.settings tr.differs td { background: var(--card); font-weight: 600; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; max-width: 36rem; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--muted); overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, monospace; }
@media (max-width: 30rem) { th, td { padding-right: .55rem; } body { font-size: 15px; } }
"""


def section(title: str, body: str) -> str:
    """Return a section under its heading; nothing where it has nothing to show."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def cells(values: Iterable[str]) -> str:
    """Return the cells of a table row, escaped."""
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def table(head: Sequence[str], rows: Sequence[str], kind: str = "figures-table") -> str:
    """Return a table that scrolls sideways on a narrow page; ``rows`` are HTML. Nothing without rows."""
    if not rows:
        return ""
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody></table></div>\n"
    )


def figures(drawings: Sequence[tuple[str, Draw]]) -> str:
    """Return captioned images, each drawn for light and for dark pages."""
    if not drawings:
        return ""
    drawn = []
    for caption, draw in drawings:
        light, dark = (
            "data:image/png;base64," + base64.b64encode(plots.png_bytes(draw(theme))).decode()
            for theme in (plots.LIGHT, plots.DARK)
        )
        drawn.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escape(caption)}"></picture>'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        )
    return f'<div class="figures">\n{"".join(drawn)}</div>\n'
