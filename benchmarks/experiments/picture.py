"""The README's picture, domain loss against general loss, drawn from the table in RESULTS.md.

    python -m benchmarks.experiments.picture

Writes docs/domain_against_general.svg, on white, so that it reads on dark pages too.
"""

import re

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.common import ROOT, options_of

PICTURE = ROOT / "docs" / "domain_against_general.svg"
SECTION = "### All methods on one domain"
_ROW = re.compile(r"^\| ([\w% ]+?) \| [^|]*?\(([+-][\d.]+)[^|]*\| [^|]*?\(([+-][\d.]+)")
_STRONG, _FAINT, _GRID = "#d55e00", "#0072b2", "#d0d7de"
_OWN = ("dga gradient", "dga update", "das update")
_LEFT_OUT = ("tacl", "taco", "prompt")
"""Methods whose point would leave the others in a corner; the picture's title names them."""
_LABELS = {
    "kd": (-16, -4),
    "freeze_layers 3": (-10, -16),
    "das update": (-38, 9),
    "rehearsal 5%": (-18, 13),
    "dga update": (-30, -27),
    "dga gradient": (4, 12),
    "simcse": (8, 2),
    "adapted_deit": (6, -13),
    "mlm": (7, -4),
}
"""Where the label of a point stands from it, in points, in the crowd; the others' stand up and right."""


def points() -> dict[str, tuple[float, float]]:
    """Read the change of domain and of general loss (nats a predicted token) by method from RESULTS.md."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    section = text.split(SECTION)[1].split("\n### ")[0]
    found = (_ROW.match(line) for line in section.splitlines())
    return {row[1]: (float(row[2]), float(row[3])) for row in found if row}


def draw() -> Figure:
    """Draw the points: better is further down (domain) and further left (general)."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, (domain, general) in points().items():
        if name in _LEFT_OUT:
            continue
        colour = _STRONG if name in _OWN else _FAINT
        axes.plot(general, domain, "o", color=colour, markersize=6)
        axes.annotate(
            name,
            (general, domain),
            _LABELS.get(name, (5, 4)),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
        )
    axes.plot(0, 0, "s", color="#57606a", markersize=6)
    axes.annotate("before", (0, 0), (5, -11), textcoords="offset points", fontsize=8, color="#57606a")
    axes.set_xlabel("general loss (Wikipedia): forgotten, nats a token")
    axes.set_ylabel("domain loss (ACL abstracts): learnt")
    axes.set_xlim(right=0.25)
    axes.set_ylim(bottom=-0.295)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"22.7 M parameters, 82,000 tokens, 2 seeds. Off the picture: {', '.join(_LEFT_OUT)}",
        fontsize=9,
        loc="left",
    )
    return figure


def main() -> None:
    """Write the picture."""
    options_of(__doc__, data=False)
    with rc_context({"svg.hashsalt": "dga_scale", "svg.fonttype": "none"}):  # the same bytes each time
        draw().savefig(PICTURE, metadata={"Date": None})
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
