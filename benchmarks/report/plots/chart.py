"""Says what a plot shows, before anything is drawn: panels, axes with their ticks, points with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Scale = Literal["linear", "log", "root"]
LOG_FROM = 6.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic: below it has two ticks."""
NATS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Ticks of losses on a root scale."""


@dataclass(frozen=True)
class Axis:
    """Holds one axis: its label with the unit, its scale, its ends, and where its ticks are."""

    label: str
    scale: Scale
    low: float
    high: float
    ticks: list[float]


@dataclass(frozen=True)
class Series:
    """Holds the points of one method; `low` and `high` are 95 % intervals, of x in dots and else of y."""

    method: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """Holds one pair of axes.

    Attributes
    ----------
    title : str
    x, y : Axis
    series : list of Series
    level : (float, str) or None
        A line across all of the panel, with what it is: horizontal in lines, vertical in dots.
    limit : list of (float, float)
        A grey curve above which nothing can be.
    front : list of (float, float)
        A grey staircase: no point is left of and below it.
    names : list of str
        Of dots: what stands at y = 0, 1, ... Of error bars: what stands below each tick of x.
    """

    title: str
    x: Axis
    y: Axis
    series: list[Series]
    level: tuple[float, str] | None = None
    limit: list[tuple[float, float]] = field(default_factory=list)
    front: list[tuple[float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Holds a whole plot.

    Attributes
    ----------
    kind : {"lines", "dots", "error-bars"}
        Lines have bands; with error bars they are thin, and intervals stand at each point.
    title : str
    panels : list of Panel
    columns : int
        Panels side by side.
    note : str
        What stands below: what is not drawn, and why.
    """

    kind: Literal["lines", "dots", "error-bars"]
    title: str
    panels: list[Panel]
    columns: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it, with five digits, to be compared with what it was."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def axis(label: str, values: Sequence[float], scale: Scale | Literal["auto"] = "auto", most: int = 7) -> Axis:
    """Choose ends and ticks so that `values` fill the axis, and none lies on its frame.

    Parameters
    ----------
    label : str
        With the unit.
    values : sequence of float
        All that is drawn, ends of intervals as well; what is not finite is left out.
    scale : {"auto", "linear", "log", "root"}
        ``auto`` takes a logarithm where all values are positive and the largest is `LOG_FROM` times the smallest.
    most : int
        Ticks at most.
    """
    found = [float(v) for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if scale == "auto":
        scale = "log" if low > 0 and high / low >= LOG_FROM else "linear"
    if scale == "log":
        room = (high / low) ** 0.06
        low, high = low / room, high * room
        ticks = [t * 10.0**e for e in range(-6, 7) for t in (1, 2, 3, 5)]
    elif scale == "root":
        ends = [math.copysign(math.sqrt(abs(v)), v) for v in (min(low, 0.0), high)]
        room = 0.07 * (ends[1] - ends[0]) or 0.1
        low, high = (math.copysign(v * v, v) for v in (ends[0] - room, ends[1] + room))
        ticks = [*NATS, *(-t for t in NATS if t)]
    else:
        room = 0.07 * (high - low) or 0.1 * abs(high) or 0.1
        low, high = low - room, high + room
        step = _step((high - low) / most)
        first = math.ceil(low / step - 1e-9)
        ticks = [round((first + i) * step, 10) for i in range(int((high - low) / step) + 2)]
    inside = sorted(t for t in ticks if low <= t <= high)
    while len(inside) > most:
        inside = inside[::2]
    return Axis(label, scale, low, high, inside)


def _step(rough: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(float(f"{m * power:.6g}") for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return value
