"""Computes the intervals of means over windows, or items, and over the seeds that a method was fitted with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from resting.benchmarks.quality.intervals import RESAMPLES, SEED, Interval, paired_interval

Number = Sequence[np.ndarray]
"""One number: the mean over its groups, texts say, of means over arrays [seeds, values]. All groups have its seeds."""


def by_seed(rows: pd.DataFrame, number: str) -> pd.DataFrame:
    """Lay out single values as [values, seeds].

    Parameters
    ----------
    rows : DataFrame
        Columns seed, value and `number`; of one method, target and metric.
    number : {"window", "item"}
        The column that numbers the values.

    Returns
    -------
    DataFrame
        NaN where a seed has no value, so that no mean leaves it out without a word.
    """
    return rows.pivot(index=number, columns="seed", values="value").astype(float)


def interval(*numbers: Number, of: Callable[..., np.ndarray] = lambda number: number) -> tuple[float, float]:
    """Compute the 95 % interval of a number, or of what is computed from several, over values and seeds.

    Values are resampled as everywhere (`quality.intervals.paired_interval`), in means over seeds: seeds are scored on
    the same windows. To every resample an error of the mean over seeds is added, which is distributed as Student's
    t with one degree of freedom less than there are seeds, times the standard error over seeds: resampling three seeds
    would say little of their spread, and too little of how uncertain it is.

    Parameters
    ----------
    *numbers : sequence of ndarray [seeds, values]
        Their values are drawn together, and their seeds for themselves. With one seed nothing is added.
    of : callable
        From the numbers to the one whose interval is wanted.

    Returns
    -------
    (float, float)
        NaN where a group has too few values.

    Notes
    -----
    The sum of both errors has the Behrens-Fisher distribution. What varies with window and seed together is in both
    parts. Of a thousand simulations each of 2, 3 and 5 seeds on 64 windows, with spreads between seeds from a fiftieth
    of that between windows to twice it, 93 to 99 % held the truth; with seeds resampled as windows are, 53 to 95 %.
    """
    errors = [_of_seeds(groups, place) for place, groups in enumerate(numbers)]
    means = [[group.mean(0) for group in groups] for groups in numbers]
    return paired_interval(*means, of=lambda *drawn: of(*(mean + error for mean, error in zip(drawn, errors))))


def sentence(rows: pd.DataFrame) -> str:
    """Say which methods were fitted with several seeds, and what their numbers are; nothing where there are none."""
    counts = rows.groupby("method", sort=False).seed.nunique()
    named = ", ".join(f"{method} ({count})" for method, count in counts.items() if count > 1)
    if not named:
        return ""
    return (
        f"Several seeds: {named}. Numbers of these methods are means over their seeds, and intervals and standard "
        "errors are over windows (or items) and seeds; those of all others are over windows (or items) alone."
    )


def mean(groups: Number) -> Interval:
    """Average over groups the means over their values and seeds, every group with the same weight."""
    return Interval(_mean(groups), *interval(groups))


def difference(groups: Number, other: Number) -> Interval:
    """Subtract the means of `other` from those of `groups`, over the same values and each over its own seeds."""
    return Interval(_mean(groups) - _mean(other), *interval(groups, other, of=lambda a, b: a - b))


def _mean(groups: Number) -> float:
    return float(np.mean([group.mean() for group in groups]))


def _of_seeds(groups: Number, place: int) -> np.ndarray | float:
    """Errors [RESAMPLES] of the mean over seeds, in an order of their own for the number at `place`."""
    by_seed = np.mean([group.mean(1) for group in groups], 0)
    count = len(by_seed)
    if count == 1:
        return 0.0
    from scipy import stats  # half a second, which a run without seeds need not wait for

    # Quantiles in a random order, not random numbers: tails of few degrees of freedom are long.
    quantiles = stats.t.ppf((np.arange(RESAMPLES) + 0.5) / RESAMPLES, count - 1)
    order = np.random.default_rng([SEED, 1 + place]).permutation(RESAMPLES)
    return np.asarray(by_seed.std(ddof=1) / np.sqrt(count) * quantiles[order])
