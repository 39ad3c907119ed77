"""Draws a chart with matplotlib, as PNG and SVG."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from resting.benchmarks.report import style
from resting.benchmarks.report.plots.chart import Axis, Chart, Panel, Series

plt.rcParams |= {
    "svg.hashsalt": "resting",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.handlelength": 3.2,
}
CLOSE = 0.02
"""Share of an axis below which two curves lie on one another; the lower one is then drawn as a broad shade."""


def write(chart: Chart, folder: Path, stem: str) -> str:
    """Draw `chart` into `folder`, and return the name of the PNG; the SVG beside it has the same stem."""
    return save(figure(chart), folder, stem)


def figure(chart: Chart) -> plt.Figure:
    """Draw `chart`."""
    return _dots(chart) if chart.kind == "dots" else _lines(chart)


def save(made: plt.Figure, folder: Path, stem: str) -> str:
    """Write a figure as PNG and SVG, and return the name of the PNG."""
    if made.get_layout_engine() is None:
        made.set_layout_engine("constrained")
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        made.savefig(folder / f"{stem}.{kind}", dpi=160, metadata=metadata)
    plt.close(made)
    return f"{stem}.png"


def below(made: plt.Figure, handles: dict[str, Any], note: str) -> None:
    """Write a legend below all panels, and `note` below it, on room that the figure gains."""
    width, high = made.get_size_inches()
    lines = textwrap.wrap(note, int(width * 15))
    columns = max(1, min(len(handles), int(width * 12 / (max(map(len, handles), default=1) + 11))))
    of_note = 0.1 + 0.15 * len(lines) if lines else 0.0
    of_legend = 0.16 + 0.185 * -(-len(handles) // columns) if handles else 0.0
    whole = high + of_note + of_legend
    made.set_size_inches(width, whole)
    room = (of_note + of_legend) / whole
    made.set_layout_engine("constrained", rect=(0.0, room, 1.0, 1.0 - room))
    if handles:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, of_note / whole), "borderaxespad": 0.2}
        made.legend(handles.values(), handles, ncols=columns, frameon=False, fontsize=8.5, **place)
    if lines:
        at = {"va": "top", "linespacing": 1.25, "fontsize": 7.5, "color": "0.35"}
        made.text(0.1 / width, (of_note - 0.02) / whole, "\n".join(lines), **at)


def depths(series: list[Series], axis: Axis) -> dict[str, int]:
    """Count by method how many later curves hide it: those at the same x whose y are `CLOSE`."""
    place = _scaled(axis)
    span = place(axis.high) - place(axis.low)
    curves = {s.method: dict(zip((round(v, 2) for v in s.x), (place(y) for y in s.y))) for s in series}
    names, out = list(curves), dict.fromkeys(curves, 0)
    for i, below in enumerate(names):
        for above in names[i + 1 :]:
            shared = curves[below].keys() & curves[above].keys()
            if len(shared) >= 2 and all(abs(curves[below][x] - curves[above][x]) < CLOSE * span for x in shared):
                out[below] += 1
    return out


def _lines(chart: Chart) -> plt.Figure:
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    width = 1.0 + (6.4 if len(chart.panels) == 1 else 3.9) * columns
    made, axes = plt.subplots(rows, columns, figsize=(width, 0.5 + 3.4 * rows), squeeze=False)
    looks = style.styles(style.in_order(s.method for panel in chart.panels for s in panel.series))
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(chart.panels) :]:
        axis.set_visible(False)
    for number, (axis, panel) in enumerate(zip(axes.flat, chart.panels)):
        _frame(axis, panel)
        if chart.kind == "error-bars":
            axis.set_xticks(panel.x.ticks, panel.names, fontsize=7.5)
        axis.grid(color="0.92", linewidth=0.6)
        before = number and chart.panels[number - 1]
        if number % columns and before and before.y.label == panel.y.label:
            axis.set_ylabel("")
        if panel.level is not None:
            handles[panel.level[1]] = axis.axhline(panel.level[0], color="0.4", linewidth=1)
        if panel.limit:
            handles["limit (bytes)"] = axis.plot(*zip(*panel.limit), color="0.55", linewidth=1)[0]
        if panel.front:
            steps = {"color": "0.55", "linewidth": 1, "drawstyle": "steps-post"}
            handles["Pareto front"] = axis.plot(*zip(*panel.front), **steps)[0]
        deep = depths(panel.series, panel.y)
        for series in panel.series:
            look, hidden = looks[series.method], deep[series.method]
            if series.low and chart.kind == "error-bars":
                ends = [
                    [y - low for y, low in zip(series.y, series.low)],
                    [h - y for h, y in zip(series.high, series.y)],
                ]
                bar = {"ecolor": look.colour, "elinewidth": 1.1, "capsize": 2.0, "fmt": "none", "zorder": 2.5}
                axis.errorbar(series.x, series.y, yerr=np.maximum(ends, 0.0), **bar)
            elif series.low and len(series.x) > 1:
                axis.fill_between(series.x, series.low, series.high, color=look.colour, alpha=0.12, linewidth=0)
            if hidden:  # a broad shade below the curves that would hide it
                axis.plot(series.x, series.y, color=look.colour, linewidth=2.5 + 2.5 * hidden, alpha=0.22)
            size = 4.0 if chart.kind == "error-bars" else 5.0  # bars are often shorter than a marker
            line = look.line | {"markersize": size + 1.6 * hidden, "markeredgewidth": 1.1}
            if series.method == "dense":
                line["linestyle"] = "none"
            handles[series.method] = axis.plot(series.x, series.y, zorder=3 - 0.1 * hidden, **line)[0]
    made.suptitle(chart.title, fontsize=11)
    first = [name for name in handles if name not in looks]
    shown = {name: handles[name] for name in (*first, *style.in_order(m for m in handles if m in looks))}
    below(made, shown, chart.note)
    return made


def _dots(chart: Chart) -> plt.Figure:
    names = chart.panels[0].names
    label = 1.0 + 0.068 * max(map(len, names))
    each = 4.6 if len(chart.panels) == 1 else 2.5
    width = label + each * len(chart.panels)
    made, axes = plt.subplots(
        1, len(chart.panels), figsize=(width, 1.25 + 0.29 * len(names)), squeeze=False, sharey=True
    )
    looks = style.styles(style.in_order(s.method for panel in chart.panels for s in panel.series))
    for axis, panel in zip(axes[0], chart.panels):
        _frame(axis, panel)
        axis.set_xlabel("")
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.hlines(range(len(names)), panel.x.low, panel.x.high, color="0.95", linewidth=0.6, zorder=0)
        if panel.level is not None:
            axis.axvline(panel.level[0], color="0.4", linewidth=1)
            where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axis.annotate(panel.level[1], (panel.level[0], 1.0), xytext=(0, 2), ha="center", fontsize=7.5, **where)
        for series in panel.series:
            look = looks[series.method].line | {"linestyle": "none"}
            for i, (x, y) in enumerate(zip(series.x, series.y)):
                if x > panel.x.high:  # beyond the frame: its number at the edge, with an arrow
                    at = {"ha": "right", "va": "center", "fontsize": 8, "color": looks[series.method].colour}
                    axis.annotate(f"{series.text[i]} →", (panel.x.high, y), **at)
                    continue
                bars = [[max(0.0, x - series.low[i])], [max(0.0, series.high[i] - x)]] if series.low else None
                axis.errorbar(x, y, xerr=bars, capsize=2.5, elinewidth=1.2, markersize=6.5, **look)
                if series.text:
                    end = series.high[i] if series.low and math.isfinite(series.high[i]) else x
                    at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                    axis.annotate(series.text[i], (max(x, end), y), **at)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.tick_params(axis="y", length=0)
    made.supxlabel(chart.panels[0].x.label, fontsize=9)
    made.suptitle(chart.title, fontsize=10.5)
    below(made, {}, chart.note)
    return made


def _frame(axis: plt.Axes, panel: Panel) -> None:
    axis.set_title(panel.title)
    for mine, scale, limits, label, given in (
        (axis.xaxis, axis.set_xscale, axis.set_xlim, axis.set_xlabel, panel.x),
        (axis.yaxis, axis.set_yscale, axis.set_ylim, axis.set_ylabel, panel.y),
    ):
        if given.scale == "root":
            scale("function", functions=(_root, _square))
        elif given.scale == "log":
            scale("log")
        limits(given.low, given.high)
        mine.set_major_locator(FixedLocator(given.ticks))
        mine.set_minor_locator(NullLocator())
        # On a linear axis all ticks have the digits that one of them needs.
        digits = max((len(f"{t:g}".partition(".")[2]) for t in given.ticks), default=0)
        form = f".{digits}f" if given.scale == "linear" else "g"
        mine.set_major_formatter(FuncFormatter(lambda v, _, form=form: f"{v:{form}}"))
        label(given.label)


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


def _scaled(axis: Axis) -> Any:
    if axis.scale == "log":
        return lambda v: math.log(max(v, 1e-12))
    if axis.scale == "root":
        return lambda v: math.copysign(math.sqrt(abs(v)), v)
    return float
