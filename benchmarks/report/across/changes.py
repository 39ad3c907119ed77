"""Says whether a number grows, holds or falls from the first to the last of several models or lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from resting.benchmarks.quality.intervals import Interval

Ends = tuple[float, float, float]
"""A value with the ends of its interval."""


def change(first: Ends, last: Ends) -> Interval:
    """Subtract two numbers that were measured independently of one another.

    The interval is made of theirs by MOVER (Zou and Donner, 2008, doi:10.1002/sim.3095): the distance of each end is
    the root of the sum of squares of the distances that make the difference so small, or so large.

    Parameters
    ----------
    first, last : (value, low, high)

    Returns
    -------
    Interval
        Of ``last - first``; its ends are NaN where one of them has no interval.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, last
    low, high = math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    return Interval(b - a, b - a - low, b - a + high)


def direction(numbers: Sequence[Ends]) -> str:
    """Name the way that numbers go: grows, falls, holds within noise, or goes both ways.

    A step, or the whole way from the first to the last, counts where the interval of its difference excludes zero.
    """
    steps = [change(*pair) for pair in pairwise(numbers)]
    if any(step.low > 0 for step in steps) and any(step.high < 0 for step in steps):
        return "goes both ways"
    whole = change(numbers[0], numbers[-1])
    if math.isnan(whole.low):
        return "no interval"
    return "holds within noise" if whole.holds_zero else "grows" if whole.value > 0 else "falls"
