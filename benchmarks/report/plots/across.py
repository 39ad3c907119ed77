"""Says what a plot over several models or lengths shows: a panel a target, a line a method, with error bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

from resting.benchmarks.report.plots.chart import Axis, Chart, Panel, Series, axis
from resting.benchmarks.report.style import in_order
from resting.benchmarks.report.table import shown_target

NEAREST = 0.1
"""Share of the axis that neighbours need between them on a logarithmic scale: below it their names and bars overlap."""
CLUSTER = 0.45
"""Share of the room between neighbours in which the methods of one place stand side by side."""
WIDTH = 14
"""Letters of a line below a tick."""
Values = Mapping[float, Mapping[str, Sequence[tuple[float, float, float] | None]]]
"""By target and method, for every place: the value with the ends of its interval, if there is one."""


def chart(values: Values, x: Sequence[tuple[float, str]], x_label: str, y_label: str, title: str, most: float) -> Chart:
    """Show `values` against `x`.

    Parameters
    ----------
    values : mapping
    x : sequence of (float, str)
        Where every value stands, in rising order, and what its tick is called. The scale is logarithmic; where two are
        too near one another for that, all are evenly spaced, and the label says so.
    x_label, y_label, title : str
    most : float
        What is above is named and not drawn.
    """
    places, scale = _places([at for at, _ in x])
    near = min(b - a for a, b in pairwise(places))
    outside: list[str] = []
    panels = []
    for target, of in values.items():
        series = []
        for number, method in enumerate(in_order(of)):
            shift = CLUSTER * near * ((number + 0.5) / len(of) - 0.5)
            kept = [(at + shift, *end) for at, end in zip(places, of[method]) if end is not None and end[0] <= most]
            outside += [
                f"{method} at {shown_target(target)} of {name} ({end[0]:.1f})"
                for (_, name), end in zip(x, of[method])
                if end is not None and end[0] > most
            ]
            if kept:
                xs, ys, lows, highs = map(list, zip(*kept))
                has_ends = not any(map(math.isnan, lows))
                series.append(Series(method, xs, ys, lows if has_ends else [], highs if has_ends else []))
        drawn = [v for s in series for v in (*s.y, *s.low, *s.high)]
        y = axis(y_label, [0.0, *drawn], "root" if most < math.inf else "linear", 8)
        of_x = Axis(f"{x_label} ({scale})", "linear", places[0] - 0.6 * near, places[-1] + 0.6 * near, list(places))
        names = [_wrapped(name) for _, name in x]
        level = (0.0, "dense") if most < math.inf else None
        panels.append(Panel(f"at {shown_target(target)}", of_x, y, series, level, names=names))
    note = "Error bars: 95 %. Methods stand side by side at every place."
    note += f" Above {most:g}, and not drawn: {', '.join(outside)}." if outside else ""
    return Chart("error-bars", title, panels, 3 if len(panels) % 3 == 0 else min(2, len(panels)), note)


def _places(values: Sequence[float]) -> tuple[list[float], str]:
    """Logarithms of `values` where these stand apart, else their order."""
    logs = [math.log10(value) for value in values]
    if min(b - a for a, b in pairwise(logs)) >= NEAREST * (logs[-1] - logs[0]) > 0:
        return logs, "log scale"
    return list(map(float, range(len(values)))), "evenly spaced"


def _wrapped(name: str) -> str:
    return "\n".join(line for part in name.split("\n") for line in textwrap.wrap(part, WIDTH))
