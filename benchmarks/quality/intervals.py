"""Paired statistics of items: differences to the dense model, means over tasks, and what a guess would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the ends are NaN where there are too few items."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return not (self.low > 0.0 or self.high < 0.0)


def mean(tasks: Sequence[np.ndarray]) -> Interval:
    """Mean over tasks of means over items, every task with the same weight.

    The interval is that of a bootstrap over the items of each task (percentile, seeded); differences to another model
    on the same items, given as such, make it a paired one.
    """
    value = float(np.mean([items.mean() for items in tasks]))
    if min(len(items) for items in tasks) < 3:
        return Interval(value, float("nan"), float("nan"))
    random = np.random.default_rng(0)
    drawn = [items[random.integers(len(items), size=(RESAMPLES, len(items)))].mean(1) for items in tasks]
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def difference(items: Sequence[float], dense: Sequence[float]) -> Interval:
    """Mean of ``items - dense``, item by item, with the interval of a paired bootstrap."""
    return mean([np.asarray(items, dtype=float) - np.asarray(dense, dtype=float)])


def is_above_chance(correct: Sequence[float], chance: float) -> bool:
    """Whether the 95 % interval (Wilson) of an accuracy lies above what a guess gives."""
    n = len(correct)
    found = stats.binomtest(round(sum(correct)), n).proportion_ci(0.95, method="wilson")
    return bool(found.low > chance)
