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
MOST = 12
"""Curves at most in a plot of perplexities; where there are more methods, the others are named below it."""


def perplexity_chart(
    frame: pd.DataFrame,
    texts: list[str],
    title: str,
    windows: pd.DataFrame | None = None,
    reference: str | None = None,
) -> Chart:
    """Show the log of the perplexity over the dense one against measured bytes: a panel per text, a line per method.

    Parameters
    ----------
    frame : DataFrame
        Rows of results.csv of one model and one token policy. Only methods with several targets are lines.
    texts : list of str
    title : str
    windows : DataFrame, optional
        Single windows, from which intervals come.
    reference : str, optional
        A method that is drawn however many others there are (`few`).
    """
    counts = frame[frame.method != "dense"].groupby("method", sort=False).target.nunique()
    methods, left_out = few(frame, texts, in_order(m for m in counts.index if counts[m] > 1), reference)
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
    return Chart("lines", title, panels, len(panels), " ".join(filter(None, (left_out, not_drawn(outside), bands))))


def few(frame: pd.DataFrame, texts: list[str], methods: list[str], reference: str | None) -> tuple[list[str], str]:
    """Choose at most `MOST` of `methods` to be drawn, and name the others in a note.

    These are `reference` and those that lose least at the target that most methods have, in the mean over texts. One
    that lies on the curve of another in all panels is named as such, and takes no place.

    Parameters
    ----------
    frame : DataFrame
        As in `perplexity_chart`.
    texts, methods : list of str
    reference : str or None

    Returns
    -------
    list of str
        In the order of `methods`.
    str
        The note; empty where all are drawn.
    """
    tables = []
    for text in texts if len(methods) > MOST else ():
        rows = frame[(frame.metric == f"{text}_perplexity") & np.isfinite(frame.value)]
        dense, of = rows[rows.method == "dense"].value, rows[rows.method.isin(methods)]
        if not dense.empty:
            values = of.pivot_table("value", "method", "target").reindex(methods)
            tables.append(np.log(values / dense.iloc[0]))
    if not tables:
        return methods, ""
    mean = sum(tables[1:], tables[0]) / len(tables)
    at = _commonest(mean)
    nats = pd.concat([table.where(table <= BROKEN) for table in tables], axis=1)
    places = np.sign(nats) * np.sqrt(np.abs(nats))  # as high as on the axis
    ordered = sorted(methods, key=lambda m: (m != reference, math.isnan(mean[at][m]), mean[at][m]))
    drawn, rest, on = list[str](), list[str](), dict[str, list[str]]()
    for method in ordered:
        apart = {other: (places.loc[other] - places.loc[method]).abs().dropna() for other in drawn}
        near = [o for o, d in apart.items() if len(d) > len(tables) and (d < draw.CLOSE * math.sqrt(BROKEN)).all()]
        if near:
            on.setdefault(near[0], []).append(method)
        else:
            (drawn if len(drawn) < MOST else rest).append(method)
    close = f"(within {draw.CLOSE:.0%} of the axis), and not drawn".replace("%", " %")
    said = [f"On the curve of {other} {close}: {', '.join(in_order(of))}." for other, of in on.items()]
    if rest:
        least = f"Not among those that lose least at {shown_target(at)}, and not drawn"
        said.append(f"{least}: {', '.join(in_order(rest))}.")
    return [m for m in methods if m in drawn], " ".join(said)


def pictures(
    rows: pd.DataFrame,
    table: pd.DataFrame,
    windows: pd.DataFrame | None,
    texts: list[str],
    title: str,
    folder: Path,
    prefix: str = "",
    reference: str | None = None,
) -> list[str]:
    """Draw both plots into `folder`, each where there is something to draw, and return them in Markdown.

    Parameters
    ----------
    rows : DataFrame
        As in `perplexity_chart`; rows without a value are not drawn.
    table : DataFrame of Loss
        By method and target; empty where nothing was scored in one and the same way. Losses are drawn at the target
        that most methods have.
    windows, texts, title, reference
        As in `perplexity_chart`.
    folder : Path
    prefix : str
        Of the names of files.
    """
    found = []
    targets = rows[rows.method != "dense"].groupby("method").target.nunique()
    if targets.max() > 1:
        chart = perplexity_chart(rows[rows.value.notna()], texts, title, windows, reference)
        if chart.panels:  # none before the dense model is through
            name = draw.write(chart, folder, f"{prefix}perplexity")
            found.append(f"![Nats a token above dense against measured byte sparsity]({name})")
    if not table.empty:
        target = _commonest(table)
        drawn = table[target].dropna()
        drawn = drawn[[not of.unranked and math.isfinite(of.value) for of in drawn]]
        if not drawn.empty:
            name = losses(drawn, f"{title}, at {target:g}", folder, prefix)
            found.append(f"![Nats a token above dense]({name})")
    return found


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


def _commonest(table: pd.DataFrame) -> float:
    """The column, a target, that most methods have, and of these the one next to a half."""
    counts = table.notna().sum()
    return max(counts.index, key=lambda target: (counts[target], -abs(target - 0.5)))


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
