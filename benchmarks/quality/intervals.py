"""The one bootstrap behind every interval: over windows, items or steps, paired, percentile, seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
FEWEST = 3
"""Values of a group that an interval needs."""
ENDS = (0.025, 0.975)
SEED = 0
KEPT = 4000
"""Values up to which places are kept in memory: 64 MB."""


@dataclass(frozen=True)
class Interval:
    """Holds a mean with its 95 % interval; the ends are NaN where there are too few values."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Say whether 0 is not excluded."""
        return not (self.low > 0.0 or self.high < 0.0)


def drawn(n: int, random: np.random.Generator) -> np.ndarray:
    """Draw the places [RESAMPLES, n] of bootstrap samples of `n` values."""
    return random.integers(n, size=(RESAMPLES, n))


def ends(sample: np.ndarray) -> tuple[float, float]:
    """Take the 95 % interval from what bootstrap samples gave."""
    low, high = np.quantile(sample, ENDS)
    return float(low), float(high)


def paired_interval(
    *numbers: Sequence[np.ndarray], of: Callable[..., np.ndarray] = lambda number: number
) -> tuple[float, float]:
    """Compute the 95 % interval of a mean, or of what is computed from several means over the same values.

    Parameters
    ----------
    *numbers : sequence of ndarray
        Each is one number: the mean over groups of means over a group's values, for instance over texts of means over
        windows. Groups weigh the same. All numbers are drawn together, and have groups of the same lengths.
    of : callable
        From the numbers to the one whose interval is wanted.

    Returns
    -------
    (float, float)
        NaN where a group has too few values.
    """
    if min(len(group) for groups in numbers for group in groups) < FEWEST:
        return float("nan"), float("nan")
    return ends(of(*(_resampled(groups) for groups in numbers)))


def _resampled(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Means of bootstrap samples [RESAMPLES], the same samples for all groups of these lengths."""
    lengths = tuple(len(group) for group in groups)
    places = _kept_places(lengths) if sum(lengths) <= KEPT else _places(lengths)
    return np.mean([group[of_group].mean(1) for group, of_group in zip(groups, places)], 0)


def _places(lengths: tuple[int, ...]) -> Iterator[np.ndarray]:
    random = np.random.default_rng(SEED)
    return (drawn(n, random) for n in lengths)


@lru_cache(maxsize=2)
def _kept_places(lengths: tuple[int, ...]) -> list[np.ndarray]:
    """The last places, which are asked for again for every method of a table."""
    return list(_places(lengths))


def mean(groups: Sequence[np.ndarray]) -> Interval:
    """Average over groups the means over their values, every group with the same weight, with the interval."""
    return Interval(float(np.mean([group.mean() for group in groups])), *paired_interval(groups))


def difference(items: Sequence[float], dense: Sequence[float]) -> Interval:
    """Average ``items - dense``, item by item, with the interval of a paired bootstrap."""
    return mean([np.asarray(items, dtype=float) - np.asarray(dense, dtype=float)])


def is_above_chance(correct: Sequence[float], chance: float) -> bool:
    """Say whether the 95 % interval (Wilson) of an accuracy lies above what a guess gives."""
    from scipy import stats  # half a second, which few processes need

    n = len(correct)
    found = stats.binomtest(round(sum(correct)), n).proportion_ci(0.95, method="wilson")
    return bool(found.low > chance)
