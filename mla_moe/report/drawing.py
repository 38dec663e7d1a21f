"""Plots: their style, and their embedding as SVG."""

import html
import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from mla_moe.report.stage_record import StageRecord
from mla_moe.training.console import si

INK, BLUE, ACCENT, GREEN, VIOLET = "#010203", "#3b82c4", "#e07b39", "#2f9e6e", "#9a6bc9"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "legend.frameon": False, "lines.linewidth": 1.6, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.6,
}  # fmt: skip
_NO_METADATA = ("Creator", "Date", "Format", "Type")


Panel = Callable[[StageRecord], str]
"""The HTML of a plot; empty if its data are missing."""


class Line(NamedTuple):
    """A metric as a curve over the steps."""

    key: str
    label: str = ""
    color: str = BLUE
    style: str = "smooth"
    """`smooth`: faint raw values under their running mean; or a format of matplotlib such as `--` or `o-`. A marker
    alone is hollow, so that several are visible at one point."""


def curves(title: str, *lines: Line, scale: Literal["linear", "fraction", "log"] = "linear") -> Panel:
    """A panel with those of the metrics that the stage recorded. The scale `fraction` runs from 0 to 1."""
    return lambda stage: draw_curves(stage, title, lines, scale)


def draw_curves(stage: StageRecord, title: str, lines: tuple[Line, ...], scale: str = "linear") -> str:
    series = {line: stage.series(line.key) for line in lines if len(stage.finite(line.key))}
    if not series:
        return ""
    figure, axes = plot()
    if scale == "log" and any((values > 0).any() for _, values in series.values()):
        formatter = axes.yaxis.get_major_formatter()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(formatter)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if scale == "fraction":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for line, (steps, values) in series.items():
        if line.style == "smooth":
            _draw_smoothed(axes, steps, values, line)
        else:
            inside = "none" if len(line.style) == 1 else line.color
            axes.plot(
                steps, values, line.style, color=line.color, label=line.label,
                markersize=5, markeredgewidth=1.4, markerfacecolor=inside,
            )  # fmt: skip
    if len({step for steps, _ in series.values() for step in steps}) == 1:
        axes.set_xlim(left=0)  # a single evaluation, at the end
    if len(series) > 1:
        axes.legend(fontsize=9)
    return card(title, figure)


def plot(width: float = 4.6, height: float = 2.5, xlabel: str = "step") -> tuple[Figure, Axes]:
    """An empty plot over steps, small enough that its text is readable on a phone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: si(value).replace(" ", "") if abs(value) >= 10_000 else f"{value:g}")
    return figure, axes


def card(title: str, figure: Figure) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg(figure)}</figure>"


def svg(figure: Figure) -> str:
    """The figure as an SVG element in the text color of the page, without metadata that links to other sites."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata=dict.fromkeys(_NO_METADATA))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, line: Line) -> None:
    """Raw values (rasterized if there are many, to keep the page small) and their running mean."""
    axes.plot(steps, values, color=line.color, alpha=0.3, linewidth=0.8, rasterized=len(steps) > 2000)
    kernel = np.ones(len(values) // 40 * 2 + 1)
    counts = np.convolve(np.isfinite(values), kernel, "same")
    sums = np.convolve(np.nan_to_num(values), kernel, "same")
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
    axes.plot(steps, mean, color=line.color, label=line.label, marker="." if len(steps) < 10 else "")
