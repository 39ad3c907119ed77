"""Computes what methods lose against the dense model, and what share of it others give back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from resting.benchmarks.cells.ranking import Unranked
from resting.benchmarks.quality.intervals import FEWEST
from resting.benchmarks.report.compared import seeds
from resting.benchmarks.report.compared.wrapped import base_of

NO_INTERVAL = f"(no interval: fewer than {FEWEST} windows)"


@dataclass(frozen=True)
class Share:
    """Holds a share of the gap to dense, with its 95 % interval.

    Attributes
    ----------
    value, low, high : float
        1 is dense again, 0 is the bare sparsifier, below 0 is worse than it.
    of_nothing : bool
        Whether the interval of the gap itself holds 0, so that a share of it has no meaning.
    """

    value: float
    low: float
    high: float
    of_nothing: bool = False

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{100 * self.value:.0f} % {NO_INTERVAL}"
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def within_noise(self) -> bool:
        """Say whether the interval holds 0; false where there is none."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Loss:
    """Holds the nats per token lost against the dense model, with their 95 % interval.

    Attributes
    ----------
    value, low, high : float
    best : bool
        Whether it is the smallest of its column, of those that are ranked, where there are others.
    tied : bool
        Whether its paired difference to the smallest is not told from 0: its interval holds 0, or there is none.
    unranked : str
        Why it is compared with no other.
    """

    value: float
    low: float
    high: float
    best: bool = False
    tied: bool = False
    unranked: str = ""

    def __str__(self) -> str:
        if np.isnan(self.value):
            return f"- ({self.unranked})" if self.unranked else "-"
        text = f"{self.value:.3f} {NO_INTERVAL}"
        if not np.isnan(self.low):
            text = f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        if self.unranked:
            return f"{text} ({self.unranked})"
        return f"**{text}**" if self.best else f"{text} ≈" if self.tied else text


def losses(windows: pd.DataFrame, texts: list[str], unranked: Unranked | None = None) -> pd.DataFrame:
    """Compute the loss of every method over the windows of all `texts` together, every text with the same weight.

    Parameters
    ----------
    windows : DataFrame
        Columns method, target, seed, metric, window, value; of one model and one token policy.
    texts : list of str
    unranked : mapping, optional
        Methods and targets that are never the best, with the reason.

    Returns
    -------
    DataFrame
        Index method, columns target, values `Loss`. Intervals are over windows, text by text and paired, and over
        seeds (`seeds.interval`).
    """
    by_key, out = lost(windows, texts), unranked or {}
    table: dict[float, dict[str, Loss]] = {}
    for target in dict.fromkeys(target for _, target in by_key):
        means = {method: values for (method, at), values in by_key.items() if at == target}
        value = {method: float(np.mean([v.mean() for v in values])) for method, values in means.items()}
        # NaN, also where a method lacks a text, is never the best.
        ranked = [method for method in means if (method, target) not in out and np.isfinite(value[method])]
        best = min(ranked, key=lambda method: value[method], default=None)
        if len(ranked) == 1 and any(np.isfinite(value[method]) for method in means if method != best):
            best = None  # beside numbers that it is not held against
        for method, values in means.items():
            low, high = seeds.interval(values)
            tied = False
            if best is not None and method in ranked and method != best:
                tied = seeds.difference(values, means[best]).holds_zero
            reason = out.get((method, target), "")
            table.setdefault(target, {})[method] = Loss(value[method], low, high, method == best, tied, reason)
    if not table:
        return pd.DataFrame()
    return pd.DataFrame(table)[sorted(table)].loc[list(dict.fromkeys(method for method, _ in by_key))]


def reference_shares(windows: pd.DataFrame, texts: list[str], reference: str) -> pd.DataFrame:
    """Compute the share of the loss of `reference` that every other method does not have, over all `texts`.

    Returns
    -------
    DataFrame
        Index method, columns target, values `Share`; without methods where `reference` has no number.
    """
    by_key = lost(windows, texts)
    table: dict[float, dict[str, Share]] = {}
    for (method, target), values in by_key.items():
        base = by_key.get((reference, target))
        if base is None or method == reference:
            continue
        value = 1.0 - float(np.mean([v.mean() for v in values]) / np.mean([v.mean() for v in base]))
        low, high = seeds.interval(values, base, of=lambda mine, its: 1.0 - mine / its)
        table.setdefault(target, {})[method] = Share(value, low, high, seeds.interval(base)[0] <= 0.0)
    if not table:
        return pd.DataFrame()
    shown = {method for of in table.values() for method in of}
    return pd.DataFrame(table)[sorted(table)].loc[list(dict.fromkeys(m for m, _ in by_key if m in shown))]


def lost(windows: pd.DataFrame, texts: list[str]) -> dict[tuple[str, float], list[np.ndarray]]:
    """Compute nats a token above dense by method and target: for every text, of every seed and window.

    Returns
    -------
    dict
        Arrays [seeds, windows], one for each of `texts` that it or the dense model has; NaN where one of them, or a
        seed alone, has no number.
    """
    chosen = windows[windows.metric.isin([f"{text}_nll" for text in texts])]
    found: dict[tuple[str, float], dict[str, pd.DataFrame]] = {}
    for (method, target, metric), rows in chosen.groupby(["method", "target", "metric"], sort=False):
        found.setdefault((str(method), float(target)), {})[str(metric)] = seeds.by_seed(rows, "window")
    dense = found.pop(("dense", 0.0), None)
    if dense is None:
        return {}
    out: dict[tuple[str, float], list[np.ndarray]] = {}
    for key, of in found.items():
        every = sorted({seed for values in of.values() for seed in values.columns})
        none = pd.DataFrame(columns=every, dtype=float)
        known = [metric for metric in (f"{text}_nll" for text in texts) if metric in of or metric in dense]
        pairs = [(of.get(metric, none), dense.get(metric, none)) for metric in known]
        gaps = [mine.sub(its.mean(axis=1, skipna=False), axis=0) for mine, its in pairs]
        out[key] = [gap.reindex(columns=every).to_numpy(dtype=float).T for gap in gaps]
    return out


def recovered(dense: np.ndarray, base: np.ndarray, compensated: np.ndarray) -> Share:
    """Compute the share of the gap to dense that is closed, from means over the same windows.

    It is ``(base - compensated) / (base - dense)``.

    Parameters
    ----------
    dense, base, compensated : ndarray [seeds, windows]
        Nats a token; for KL, `dense` is zero.

    Returns
    -------
    Share
        With the interval over windows and seeds (`seeds.interval`).
    """

    def share(dense: np.ndarray, base: np.ndarray, compensated: np.ndarray) -> np.ndarray:
        return (base - compensated) / (base - dense)

    numbers = [dense], [base], [compensated]
    value = float(share(dense.mean(), base.mean(), compensated.mean()))
    return Share(value, *seeds.interval(*numbers, of=share), seeds.difference([base], [dense]).low <= 0.0)


def shares(windows: pd.DataFrame, text: str, metric: str) -> pd.DataFrame:
    """Compute the shares of all wrappers on one text.

    Parameters
    ----------
    windows : DataFrame
        Columns method, target, seed, metric, window, value.
    metric : {"nll", "kl"}

    Returns
    -------
    DataFrame
        Index method, columns target, values `Share`.
    """
    chosen = windows[windows.metric == f"{text}_{metric}"]
    groups = chosen.groupby(["method", "target"], sort=False)
    values = {(str(m), float(t)): seeds.by_seed(rows, "window").to_numpy().T for (m, t), rows in groups}
    table: dict[float, dict[str, Share]] = {}
    for (method, target), compensated in values.items():
        base = base_of(method, target, values)
        if base is not None and ("dense", 0.0) in values:
            share = recovered(values["dense", 0.0], values[base, target], compensated)
            table.setdefault(target, {})[method] = share
    return pd.DataFrame(table)[sorted(table)]
