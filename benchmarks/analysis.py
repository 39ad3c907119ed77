"""Paired comparisons: what share of a sparsifier's loss a compensation gives back."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Share:
    """A share of the gap to dense, with a 95 % interval.

    Attributes
    ----------
    value, low, high : float
        1 is dense again, 0 is the bare sparsifier, below 0 is worse than it.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0.0 <= self.high


def base_of(method: str) -> str | None:
    """The sparsifier that a wrapper wraps: ``"spon(teal), 144 steps"`` gives ``"teal"``."""
    match = re.match(r"[\w.-]+\((.*?)\)+(?:, .*)?$", method)
    return match[1] + ")" * match[1].count("(") if match else None


def recovered(dense: np.ndarray, base: np.ndarray, compensated: np.ndarray) -> Share:
    r"""Share of the gap to dense, ``(base - compensated) / (base - dense)``, of means over the same windows.

    Parameters
    ----------
    dense, base, compensated : ndarray [windows]
        Nats a token; for KL, `dense` is zero.

    Returns
    -------
    Share
        With the interval of a paired bootstrap over windows (percentile, 2,000 resamples, seeded).
    """

    def share(d: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        return (b - c).mean(axis) / (b - d).mean(axis)

    value = float(share(dense, base, compensated))
    if len(dense) < 3:
        return Share(value, float("nan"), float("nan"))
    interval = stats.bootstrap(
        (dense, base, compensated),
        share,
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Share(value, float(interval.low), float(interval.high))


def shares(windows: pd.DataFrame, text: str, metric: str) -> pd.DataFrame:
    """Shares of all wrappers on one text, seeds averaged window by window.

    Parameters
    ----------
    windows : DataFrame
        Columns method, target_sparsity, seed, metric, window, value.
    metric : {"nll", "kl"}

    Returns
    -------
    DataFrame
        Index method, columns target, values `Share`.
    """
    chosen = windows[windows.metric == f"{text}_{metric}"]
    by_window = chosen.groupby(["method", "target_sparsity", "window"], sort=False).value.mean()
    values = {key: group.to_numpy() for key, group in by_window.groupby(level=[0, 1], sort=False)}
    table: dict[float, dict[str, Share]] = {}
    for (method, target), compensated in values.items():
        base = base_of(method)
        if base is not None and (base, target) in values and ("dense", 0.0) in values:
            share = recovered(values["dense", 0.0], values[base, target], compensated)
            table.setdefault(target, {})[method] = share
    return pd.DataFrame(table)
