"""Draws the plots of a results folder: colour and marker tell the sparsifier, the line what is wrapped around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from resting.benchmarks.report.losses import innermost

# Colour-blind safe (Okabe-Ito); markers tell them apart in grey.
LOOKS = {
    "teal": ("#0072B2", "o"),
    "teal-greedy": ("#009E73", "s"),
    "cats": ("#E69F00", "v"),
    "chess": ("#CC79A7", "^"),
    "chess-attention": ("#D55E00", "P"),
    "rsparse": ("#56B4E9", "D"),
}
OTHERS = [("#000000", "X"), ("#8C564B", "*"), ("#7F7F7F", "h"), ("#B8A200", "p")]
DASHES = [(5, 1, 1, 1, 1, 1), (8, 2), (1, 3), (6, 2, 2, 2), (2, 1), (9, 1, 1, 1)]
LINES: list[Any] = ["-", ":", "-.", *((0, dash) for dash in DASHES)]
"""Of the first, second, ... method that wraps the same sparsifier, SPON before others; the bare one is dashed, its
marker open."""
CEILING = 12.0
"""Top of a perplexity panel, in multiples of the dense perplexity: what is above is no language model any more."""

plt.rcParams |= {
    "svg.hashsalt": "resting",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Choose line styles that tell each of `methods` from the others."""
    looks, wrapped, bare = dict(LOOKS), dict[str, int](), dict[str, int]()
    out: dict[str, dict[str, Any]] = {}
    for method in sorted(methods, key=lambda m: not m.startswith("spon")):
        base = innermost(method)
        colour, marker = looks.setdefault(base, OTHERS[(len(looks) - len(LOOKS)) % len(OTHERS)])
        out[method] = {"color": colour, "marker": marker, "linestyle": (0, (4, 2)), "markerfacecolor": "white"}
        if method == base:
            continue
        if "(" not in method:  # a bare one with a label
            out[method]["linestyle"] = (0, (4 + 3 * bare.setdefault(base, 1), 2))
            bare[base] += 1
        else:
            line = LINES[wrapped.setdefault(base, 0) % len(LINES)]
            wrapped[base] += 1
            out[method] |= {"linestyle": line, "markerfacecolor": colour}
    return {method: out[method] for method in methods}


def perplexity(frame: pd.DataFrame, texts: list[str], title: str, folder: Path, prefix: str = "") -> str:
    """Draw perplexity against measured byte sparsity, a panel per text, a line per method that has several targets.

    Returns
    -------
    str
        Name of the PNG file; the SVG beside it has the same stem.
    """
    width = 3.6 * len(texts) + 0.6
    figure, axes = plt.subplots(1, len(texts), figsize=(width, 4.0), squeeze=False)
    counts = frame.groupby("method", sort=False).target.nunique()
    methods = styles([m for m in counts.index if m != "dense" and counts[m] > 1])
    for axis, text in zip(axes[0], texts):
        _panel(axis, frame[frame.metric == f"{text}_perplexity"], text, methods)
    axes[0][0].set_ylabel("perplexity (log scale)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = max(1, min(5, len(labels), int(width * 13 / (max(map(len, labels)) + 9))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    return save(figure, folder, f"{prefix}perplexity")


def _panel(axis: plt.Axes, rows: pd.DataFrame, text: str, methods: dict[str, dict[str, Any]]) -> None:
    dense = rows[rows.method == "dense"]
    if len(dense):
        level = float(dense.value.iloc[0])
        axis.axhline(level, color="0.4", linewidth=1, label="dense")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(f"dense {level:.1f}", (0, level), xytext=(3, 3), color="0.3", fontsize=8, **place)
    for method, style in methods.items():
        of = rows[rows.method == method].groupby("target").agg({"byte_sparsity": "mean", "value": "mean"})
        axis.plot(of.byte_sparsity, of.value, label=method, markersize=4.5, linewidth=1.4, **style)
    axis.set_yscale("log")
    rows = rows[rows.method.isin(["dense", *methods])]
    if len(dense):
        axis.set_ylim(level * 0.94, min(level * CEILING, max(rows.value.max() * 1.05, level * 1.2)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_xlim(0.0, rows.byte_sparsity.max() + 0.03)
    axis.set_xlabel("measured byte sparsity")
    axis.set_title(text, fontsize=10)


def losses(table: pd.Series, title: str, folder: Path, prefix: str = "") -> str:
    """Draw what every method loses at one target, as a point with its interval, the smallest on top.

    Parameters
    ----------
    table : Series of Loss
        By method.

    Returns
    -------
    str
        Name of the PNG file; the SVG beside it has the same stem.
    """
    values = {str(method): (loss.value, loss.low, loss.high) for method, loss in table.items()}
    positive = min(value for value, _, _ in values.values()) > 0
    label = f"nats a token above dense{' (log scale)' if positive else ''}, mean over texts, 95 %"
    figure, axis = dots(values, label, title, lambda v: f"{v:.{3 if v < 10 else 1}f}", smallest_on_top=True)
    if positive:
        axis.set_xscale("log")
        ends = [end for ends in values.values() for end in ends if end > 0]
        axis.set_xlim(min(ends) * 0.85, max(ends) * 1.4)
        ticks = [t * 10.0**e for e in range(-4, 4) for t in (1, 2, 3, 5)]
        low, high = axis.get_xlim()
        inside = [t for t in ticks if low <= t <= high]
        axis.xaxis.set_major_locator(FixedLocator(inside if len(inside) < 9 else inside[::2]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    return save(figure, folder, f"{prefix}losses")


def dots(
    values: dict[str, tuple[float, float, float]],
    label: str,
    title: str,
    shown: Callable[[float], str],
    smallest_on_top: bool,
) -> tuple[plt.Figure, plt.Axes]:
    """Draw a point with its interval for every method, the best on top.

    Parameters
    ----------
    values : dict of str to (float, float, float)
        By method: value, low, high.
    label : str
        Of the axis.
    shown : callable
        From a value to the text beside its point.
    """
    ordered = sorted(values.items(), key=lambda item: -item[1][0] if smallest_on_top else item[1][0])
    width = 5.4 + 0.065 * max(len(method) for method in values)
    figure, axis = plt.subplots(figsize=(width, 1.2 + 0.3 * len(ordered)))
    methods = styles(list(values))
    for place, (method, (value, low, high)) in enumerate(ordered):
        style = methods[method] | {"linestyle": "none"}
        bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar(value, place, xerr=bars, capsize=2.5, elinewidth=1.2, markersize=6, **style)
        at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axis.annotate(shown(value), (max(value, high), place), **at)
    axis.set_yticks(range(len(ordered)), [method for method, _ in ordered])
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    figure.supxlabel(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure, axis


def save(figure: plt.Figure, folder: Path, stem: str) -> str:
    """Write a figure as PNG and SVG, and return the name of the PNG."""
    figure.set_layout_engine("constrained")
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{stem}.{kind}", dpi=160, metadata=metadata)
    plt.close(figure)
    return f"{stem}.png"
