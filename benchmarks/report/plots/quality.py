"""Plots of quality: what methods lose against measured bytes, and what every method loses at one target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.plots import draw
from resting.benchmarks.report.plots.chart import Axis, Chart, Panel, Series, axis
from resting.benchmarks.report.style import BROKEN, in_order
from resting.benchmarks.report.table import shown_target

BYTES = "weight bytes left unread (share, measured)"


def perplexity_chart(frame: pd.DataFrame, texts: list[str], title: str, windows: pd.DataFrame | None = None) -> Chart:
    """Show the log of the perplexity over the dense one against measured bytes: a panel per text, a line per method.

    Parameters
    ----------
    frame : DataFrame
        Rows of results.csv of one model and one token policy. Only methods with several targets are lines.
    texts : list of str
    title : str
    windows : DataFrame, optional
        Single windows, from which intervals come.
    """
    counts = frame[frame.method != "dense"].groupby("method", sort=False).target.nunique()
    methods = in_order(m for m in counts.index if counts[m] > 1)
    found, outside = [], dict[tuple[str, float], float]()
    for text in texts:
        rows = frame[(frame.metric == f"{text}_perplexity") & np.isfinite(frame.value)]
        dense = rows[rows.method == "dense"].value
        if dense.empty:
            continue
        spread = pd.DataFrame() if windows is None else analysis.losses(windows, [text])
        series = []
        for method in methods:
            of = rows[rows.method == method].groupby("target").agg({"byte_sparsity": "mean", "value": "mean"})
            nats = np.log(of.value / dense.iloc[0])
            for target in of.index[nats > BROKEN]:
                outside.setdefault((method, target), float(nats[target]))
            of, nats = of[nats <= BROKEN], nats[nats <= BROKEN]
            if len(of):
                x, y = of.byte_sparsity.tolist(), nats.tolist()
                series.append(Series(method, x, y, *_ends(spread, method, of.index.tolist())))
        found.append((f"{text} (dense: {dense.iloc[0]:.1f})", series))
    everything = [s for _, series in found for s in series]
    x = axis(BYTES, [v for s in everything for v in s.x])
    y = axis("nats a token above dense", [0.0, *(v for s in everything for v in (*s.y, *s.low, *s.high))], "root", 9)
    panels = [Panel(name, x, y, series, (0.0, "dense")) for name, series in found]
    bands = "Bands: 95 % of the paired difference to dense." if any(s.low for s in everything) else ""
    return Chart("lines", title, panels, len(panels), f"{not_drawn(outside)} {bands}".strip())


def perplexity(
    frame: pd.DataFrame,
    texts: list[str],
    title: str,
    folder: Path,
    prefix: str = "",
    windows: pd.DataFrame | None = None,
) -> str:
    """Draw `perplexity_chart` into `folder`, and return the name of the PNG."""
    return draw.write(perplexity_chart(frame, texts, title, windows), folder, f"{prefix}perplexity")


def not_drawn(outside: Mapping[tuple[str, float], float]) -> str:
    """Name what is above `BROKEN` nats."""
    if not outside:
        return ""
    named = ", ".join(f"{method} at {shown_target(target)} ({nats:.1f})" for (method, target), nats in outside.items())
    return f"Above {BROKEN:g} nats, and not drawn: {named}."


def losses_chart(table: pd.Series, title: str) -> Chart:
    """Show what every method loses at one target, as a point with its interval, the smallest on top.

    Parameters
    ----------
    table : Series of Loss
        By method.
    """
    values = {str(method): (loss.value, loss.low, loss.high) for method, loss in table.items()}
    label = "nats a token above dense, mean over texts, with 95 % intervals"
    return dots_chart({"": values}, label, title, lambda v: f"{v:.{3 if v < 10 else 1}f}", True)


def losses(table: pd.Series, title: str, folder: Path, prefix: str = "") -> str:
    """Draw `losses_chart` into `folder`, and return the name of the PNG."""
    return draw.write(losses_chart(table, title), folder, f"{prefix}losses")


def dots_chart(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]],
    label: str,
    title: str,
    shown: Callable[[float], str] | None,
    smallest_on_top: bool,
    level: tuple[float, str] | None = None,
) -> Chart:
    """Show a point with its interval for every method, a panel per title, the best of the last on top.

    Parameters
    ----------
    values : dict of str to dict of str to (float, float, float)
        By title of a panel, by method: value, low, high.
    label : str
        Of the axis.
    title : str
    shown : callable, optional
        From a value to the text beside its point.
    smallest_on_top : bool
        Whether less is better. What is above `BROKEN` is then named at the edge, if something is below it.
    level : (float, str), optional
        The dense model's value.
    """
    last: dict[str, float] = {}
    for of in values.values():
        last |= {method: value for method, (value, _, _) in of.items()}
    ordered = sorted(last, key=lambda m: -last[m] if smallest_on_top else last[m])
    drawn = {v for of in values.values() for v, _, _ in of.values() if not smallest_on_top or v <= BROKEN}
    everything = [v for of in values.values() for ends in of.values() for v in ends if ends[0] in drawn or not drawn]
    of_axis = axis(label, [*everything, *([] if level is None else [level[0]])], most=6 if len(values) == 1 else 4)
    if shown is not None:  # the text beside the last point needs room
        of_axis = _wider(of_axis)
    panels = []
    for name, of in values.items():
        series = [
            Series(
                method,
                [value],
                [float(ordered.index(method))],
                [] if math.isnan(low) else [low],
                [] if math.isnan(low) else [high],
                [] if shown is None else [shown(value)],
            )
            for method, (value, low, high) in of.items()
        ]
        y = Axis("", "linear", -0.6, len(ordered) - 0.4, [])
        panels.append(Panel(name, of_axis, y, series, level, names=ordered))
    return Chart("dots", title, panels, len(panels))


def _wider(of: Axis) -> Axis:
    high = of.high * (of.high / of.low) ** 0.12 if of.scale == "log" else of.high + 0.12 * (of.high - of.low)
    return Axis(of.label, of.scale, of.low, high, of.ticks)


def _ends(spread: pd.DataFrame, method: str, targets: list[float]) -> tuple[list[float], list[float]]:
    if spread.empty or method not in spread.index or any(t not in spread for t in targets):
        return [], []
    found: list[Any] = [spread.loc[method, t] for t in targets]
    if any(not isinstance(one, analysis.Loss) or math.isnan(one.low) for one in found):
        return [], []
    return [one.low for one in found], [one.high for one in found]
