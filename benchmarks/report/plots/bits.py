"""Plots of loss against what a token costs, bits read or time: a curve for every weight format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resting.benchmarks.report.plots.chart import Chart, Panel, Series, axis
from resting.benchmarks.report.style import BROKEN, in_order

BITS = "bits read a token, over the weights of the blocks"
BEST = "best of all methods"


@dataclass(frozen=True)
class Point:
    """Holds one method at one target on weights of one format.

    Attributes
    ----------
    format, method : str
    target : float
    cost : float
        Bits read a token, over the weights of the blocks' matrices, or milliseconds a token; measured.
    loss, low, high : float
        Nats a token above the dense model with its weights as they are, with the 95 % interval.
    """

    format: str
    method: str
    target: float
    cost: float
    loss: float
    low: float
    high: float


def front(points: Sequence[Point]) -> list[Point]:
    """Choose what nothing else costs less than at no more loss, from the cheapest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def chart(points: Sequence[Point], title: str, cost: str = BITS) -> Chart:
    """Show what is lost against what a token costs: a panel with the best of all methods, and one for every method.

    Parameters
    ----------
    points : sequence of Point
        Of one model; `dense` has one a format, which every curve of that format begins with.
    title : str
    cost : str
        Label of its axis.
    """
    kept = [p for p in points if p.loss <= BROKEN]
    formats = list(dict.fromkeys(p.format for p in points))
    panels: list[tuple[str, list[Series]]] = [(BEST, [_curve(f, front(_of(kept, f))) for f in formats])]
    for method in in_order(p.method for p in points if p.method != "dense"):
        mine = [p for p in kept if p.method in (method, "dense")]
        panels.append((method, [_curve(f, sorted(_of(mine, f), key=lambda p: p.cost)) for f in formats]))
    x = axis(cost, [p.cost for p in kept])
    y = axis("nats a token above dense, as is", [0.0, *(v for p in kept for v in (p.loss, p.low, p.high))], "root", 9)
    edge = [(p.cost, p.loss) for p in front(kept)]
    lost = len(points) - len(kept)
    note = f"{lost} of {len(points)} points lose more than {BROKEN:g} nats, and are not drawn. " if lost else ""
    note += "Bands: 95 % of the paired difference to the dense model with its weights as they are."
    shown = [Panel(name, x, y, [s for s in series if s.x], front=edge) for name, series in panels]
    return Chart("lines", title, shown, min(3, len(shown)), note)


def _of(points: Sequence[Point], format: str) -> list[Point]:
    return [p for p in points if p.format == format]


def _curve(format: str, points: Sequence[Point]) -> Series:
    has_ends = all(p.low == p.low for p in points)
    ends = ([p.low for p in points], [p.high for p in points]) if has_ends else ([], [])
    return Series(format, [p.cost for p in points], [p.loss for p in points], *ends)
