"""Figures of a run: heatmaps of importance and protection, loss curves, effective protection.

Drawn with matplotlib's object interface: no global state, no display. A theme sets the colours of text and
lines on a transparent background, so that the report can show one set on light and one on dark pages.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dga_scale.storage.atomic import replace_file

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""label -> (x, y)."""


@dataclass(frozen=True)
class Theme:
    """The colours of a figure. ``series`` stay apart for the colour-blind (after Okabe and Ito)."""

    text: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme("#24292f", "#d0d7de", ("#0072b2", "#d55e00", "#00825f", "#a8578a", "#8a6d00"))
DARK = Theme("#d6dde4", "#3d444d", ("#56b4e9", "#ff8a5c", "#2bc49a", "#e39cc5", "#f0c14b"))

_WIDTH = 5.4
_DPI = 160
_SMOOTH_ABOVE = 120
"""Points in a curve above which the raw values become faint and a moving average is drawn over them."""


MOST_UNITS = 512
"""The number of a layer's units above which a heatmap, or a dot for each, can't be read."""


def can_be_drawn(values: Tensor) -> bool:
    """Return whether values (layers, units) fit a heatmap: heads do, thousands of FFN units don't."""
    return values.shape[1] <= MOST_UNITS


def heatmap_figure(
    values: Tensor, title: str, unit: str, *, limits: tuple[float, float] | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw one heatmap.

    Args:
        values: (layers, units).
        unit: The noun for a column, for the axis: ``"head"``, for example.
        limits: The values of the ends of the colour scale; default: the data's.
    """
    figure = _figure(_WIDTH, 1.3 + 0.24 * min(values.shape[0], 24))
    axes = figure.add_subplot()
    _draw_heatmap(figure, axes, values, title, unit, limits, theme)
    return figure


def importance_figure(importance: Tensor, protection: Tensor, kind: str) -> Figure:
    """Draw the importance of one kind of unit beside its protection; both (layers, units)."""
    figure = _figure(2 * _WIDTH, 1.3 + 0.24 * min(importance.shape[0], 24))
    left, right = figure.subplots(1, 2)
    _draw_heatmap(figure, left, importance, "importance", kind, None, LIGHT)
    _draw_heatmap(figure, right, protection, "protection a", kind, (0.0, 1.0), LIGHT)
    return figure


def curves_figure(
    curves: Series, y_label: str, *, points: Series | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw curves over the steps; ``points`` are drawn as dashed lines with a mark at each value."""
    figure = _figure(_WIDTH, 3.1)
    axes = figure.add_subplot()
    for color, (label, (x, y)) in zip(_cycle(theme, len(curves)), curves.items(), strict=True):
        window = len(y) // 60 if len(y) > _SMOOTH_ABOVE else 1
        if window > 1:
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            smooth = np.convolve(np.asarray(y, dtype=float), np.ones(window) / window, mode="valid")
            axes.plot(x[window - 1 :], smooth, color=color, linewidth=1.8, label=label)
        else:
            axes.plot(x, y, color=color, linewidth=1.6, label=label, marker="." if len(y) == 1 else None)
    for color, (label, (x, y)) in zip(_cycle(theme, len(points or {})), (points or {}).items(), strict=True):
        axes.plot(x, y, color=color, linewidth=1.4, linestyle="--", marker="o", markersize=5, label=label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(y_label)
    _style(axes, theme)
    if len(curves) + len(points or {}) > 1:
        _legend(axes, theme)
    return figure


def protection_figure(
    units: Mapping[str, tuple[Tensor, Tensor]], kind: str, *, theme: Theme = LIGHT
) -> Figure:
    """Draw the movement of each unit of a kind beside its soft-mask 1 - a.

    Args:
        units: The figures by label: (1 - a, movement relative to an unprotected unit), each (layers, units).
        kind: The kind of unit.
    """
    figure = _figure(_WIDTH, 3.6)
    axes = figure.add_subplot()
    top = max([1.0, *(float(movement.max()) for _, movement in units.values())]) * 1.08
    axes.plot([0, 1], [0, 1], color=theme.text, linewidth=1.0, linestyle="--", label="what the mask asks for")
    axes.plot([0, 1], [1, 1], color=theme.faint, linewidth=1.4, label="no protection at all")
    for color, (label, (kept, movement)) in zip(_cycle(theme, len(units)), units.items(), strict=True):
        axes.scatter(
            kept.flatten().tolist(), movement.flatten().tolist(), s=16, color=color, alpha=0.75,
            label=label or kind, linewidths=0,
        )  # fmt: skip
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(0, top)
    axes.set_xlabel(f"soft-mask 1 - a of {kind}")
    axes.set_ylabel("movement relative to unprotected")
    _style(axes, theme)
    _legend(axes, theme)
    return figure


def trade_off_figure(
    paths: Mapping[str, Sequence[tuple[str, float, float]]], *, theme: Theme = LIGHT
) -> Figure:
    """Draw general loss against domain loss: left is learnt, low is kept.

    Args:
        paths: The points by label, in order, each (what is written at it, domain loss, general loss).
    """
    figure = _figure(_WIDTH, 3.8)
    axes = figure.add_subplot()
    for color, (label, points) in zip(_cycle(theme, len(paths)), paths.items(), strict=True):
        x, y = [domain for _, domain, _ in points], [general for _, _, general in points]
        axes.plot(x, y, color=color, linewidth=1.4, marker="o", markersize=5, label=label)
        for name, *place in points:
            axes.annotate(
                name, (place[0], place[1]), xytext=(5, 5), textcoords="offset points", fontsize=9,
                color=theme.text,
            )  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel("domain loss (less: more was learnt)")
    axes.set_ylabel("general loss (less: more was kept)")
    _style(axes, theme)
    if len(paths) > 1:
        _legend(axes, theme)
    return figure


def comparison_figure(
    points: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, theme: Theme = LIGHT
) -> Figure:
    """Draw models by their domain and general loss, a point each; dashed lines cross at the base, the first.

    Args:
        points: The label, domain losses and general losses of each: several of models trained with several
            seeds, whose mean is drawn, with a standard deviation to either side.
    """
    figure = _figure(_WIDTH, 4.2)
    axes = figure.add_subplot()
    for number, (color, (label, domain, general)) in enumerate(
        zip(_cycle(theme, len(points)), points, strict=True)
    ):
        bars = [np.std(values, ddof=1) if len(values) > 1 else None for values in (domain, general)]
        # The first point whose colour is used again gets another mark.
        marker = "osD^v"[number // len(theme.series) % 5]
        axes.errorbar(
            [np.mean(domain)], [np.mean(general)], xerr=bars[0], yerr=bars[1], color=color, marker=marker,
            markersize=7, capsize=3, linestyle="none", label=label,
        )  # fmt: skip
    for line, values in ((axes.axvline, points[0][1]), (axes.axhline, points[0][2])):
        line(float(np.mean(values)), color=theme.text, alpha=0.5, linewidth=1.0, linestyle="--", zorder=0)
    axes.margins(0.12)
    axes.set_xlabel("domain loss (less: more was learnt)")
    axes.set_ylabel("general loss (less: more was kept)")
    _style(axes, theme)
    _legend(axes, theme)
    return figure


def forgetting_figure(
    domains: Sequence[str], scores: Sequence[Sequence[float]], *, theme: Theme = LIGHT
) -> Figure:
    """Draw the end-task score on each domain after every stage of a sequence of domains.

    Args:
        domains: The domains, in the order trained on.
        scores: The scores after each domain: row i, after domain i, has those on the domains 0 to i.
    """
    figure = _figure(_WIDTH, 3.4)
    axes = figure.add_subplot()
    for k, (color, domain) in enumerate(zip(_cycle(theme, len(domains)), domains, strict=True)):
        stages = range(k, len(domains))
        values = [scores[i][k] for i in stages]
        # The first domain whose colour is used again gets another line and another mark.
        style, marker = ("-", "o") if k < len(theme.series) else ("--", "s")
        axes.plot(stages, values, color=color, linewidth=1.6, linestyle=style, marker=marker, label=domain)
    axes.set_xticks(range(len(domains)), list(domains))
    axes.set_xlabel("after training on")
    axes.set_ylabel("end-task score")
    _style(axes, theme)
    _legend(axes, theme)
    return figure


def consistency_figure(groups: Mapping[str, tuple[Tensor, float]], *, theme: Theme = LIGHT) -> Figure:
    """Draw gradient consistency: a histogram of the sequences of each group, and a line at the group's own.

    Args:
        groups: The values of the sequences (n,), and the value of the group, by label.
    """
    figure = _figure(_WIDTH, 3.1)
    axes = figure.add_subplot()
    lowest = min(-0.05, *(values.min().item() for values, _ in groups.values()))
    bins = np.linspace(lowest, 1.0, 31)
    for color, (label, (values, own)) in zip(_cycle(theme, len(groups)), groups.items(), strict=True):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values.tolist(), bins=bins.tolist(), weights=weights, color=color, alpha=0.45, label=label)
        axes.axvline(own, color=color, linewidth=1.6, linestyle="--")
    axes.set_xlabel("gradient consistency of a sequence (dashed: of the corpus)")
    axes.set_ylabel("share of sequences")
    _style(axes, theme)
    _legend(axes, theme)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as a PNG file with a transparent background, for a page of its theme's colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="none")
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file on white, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    replace_file(path, buffer.getvalue())


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as (height, width, 3) bytes, as TensorBoard takes an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _draw_heatmap(
    figure: Figure,
    axes: Axes,
    values: Tensor,
    title: str,
    unit: str,
    limits: tuple[float, float] | None,
    theme: Theme,
) -> None:
    low, high = limits or (None, None)
    matrix = values.detach().to(torch.float32).cpu().numpy()
    image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.tick_params(colors=theme.text, labelsize=9)
    bar.outline.set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(unit)
    axes.set_ylabel("layer")
    for axis, size in ((axes.yaxis, matrix.shape[0]), (axes.xaxis, matrix.shape[1])):
        axis.set_ticks(range(0, size, max(1, -(-size // 12))))
    _style(axes, theme)
    axes.grid(False)


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(theme.text)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=theme.text)


def _cycle(theme: Theme, count: int) -> list[str]:
    return [theme.series[i % len(theme.series)] for i in range(count)]
