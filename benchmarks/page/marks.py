"""Marks what is best in a column, and what cannot be told from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import pandas as pd

from resting.benchmarks.cells import ranking
from resting.benchmarks.page.collect import Folder
from resting.benchmarks.quality import intervals
from resting.benchmarks.quality.intervals import FEWEST
from resting.benchmarks.report.compared import seeds
from resting.benchmarks.report.speedups import samples as drawn_speeds
from resting.benchmarks.report.speedups import timed_in

BEST, TIED = 1, 2
COLUMN = ["model", "metric", "tokens", "dtype", "target"]
"""What rows have in common that stand in one column."""
LOWER = ("perplexity", "kl", "nats", "nll", "bits", "seconds", "sparse_p", "dense_p", "bytes", "prefill", "over_base")
HIGHER = (
    "acc",
    "exact_match",
    "f1",
    "mc1",
    "mc2",
    "speedup",
    "share",
    "tokens_per_second",
    "bandwidth",
    "over_linear",
    "over_plain",
)


def direction(metric: str) -> int:
    """Say which way is better: 1 where more is, -1 where less is, 0 where that is not known."""
    last = metric.split("/")[-1]
    # Of times, those of the dense model and the limit are no merit of a method.
    if metric.startswith("decode/") and (last.startswith(("dense_", "prefill_dense")) or last == "limit"):
        return 0
    if any(word in last for word in LOWER):
        return -1
    return 1 if any(last.startswith(word) for word in HIGHER) else 0


def add(folder: Folder) -> pd.DataFrame:
    """Add to `folder.rows` a ``mark``, and at perplexities ``loss``, ``loss_low`` and ``loss_high``, nats above dense.

    Notes
    -----
    A method is tied with the best of its column if the 95 % interval of its difference to it holds 0: of a paired
    bootstrap over the same windows or items where single values are kept, over single steps where these are times,
    else of a normal approximation with both standard errors. Several seeds add their spread (`seeds.interval`).
    """
    why = pd.Series(ranking.reasons(folder.rows), index=folder.rows.index, dtype=object)
    rows = folder.rows.assign(mark=0, loss=np.nan, loss_low=np.nan, loss_high=np.nan, low=np.nan, high=np.nan)
    singles = _by_column(folder.singles)
    steps = {
        (model, timed_in(dtype, threads, folder.machines[0]), method, target): sample
        for (model, dtype, threads, method, target), sample in drawn_speeds(folder.path).items()
    }
    for key, sample in steps.items():
        chosen = (rows.metric == "decode/speedup") & (rows[["model", "dtype", "method", "target"]] == list(key)).all(1)
        rows.loc[chosen, ["low", "high"]] = intervals.ends(sample)
    for column, of in rows.groupby(COLUMN, sort=False):
        model, metric, tokens, dtype, target = column
        values, dense = (singles.get((model, metric, tokens, t), {}) for t in (target, 0.0))
        if "perplexity" in metric and "dense" in dense and values:
            _lose(rows, of, values, dense["dense"])
        better = direction(metric)
        found = of[of.value.notna() & (of.method != "dense") & (why[of.index] == "")]
        if not better or found.method.nunique() < 2:
            continue
        means = found.groupby("method", sort=False).value.mean()
        best = means.idxmax() if better > 0 else means.idxmin()
        samples = {m: steps.get((model, dtype, m, target)) for m in means.index} if metric == "decode/speedup" else {}
        holds = _test(found, best, values, samples)
        rows.loc[found.index, "mark"] = [BEST if m == best else TIED if holds(m) else 0 for m in found.method]
    said = rows.reason.where(rows.reason.notna(), "not ranked: " + why)
    return rows.assign(reason=rows.reason.where(why == "", said))


def _test(
    found: pd.DataFrame, best: str, values: dict[str, np.ndarray], samples: dict[str, np.ndarray | None]
) -> Callable[[str], bool]:
    """From a method to whether it is within noise of the best."""

    def holds(method: str) -> bool:
        one, other = samples.get(method), samples.get(best)
        if one is not None and other is not None:
            return _holds_zero(*intervals.ends(one - other))
        a, b = values.get(method), values.get(best)
        if a is not None and b is not None and a.shape[1] == b.shape[1] >= FEWEST:
            gap = seeds.difference([a], [b])
            return _holds_zero(gap.low, gap.high)
        return _unpaired(found, method, best)

    return holds


def _unpaired(found: pd.DataFrame, method: str, best: str) -> bool:
    sides = []
    for name in (method, best):
        of = found[found.method == name]
        error = of.stderr.iloc[0] if len(of) == 1 else of.value.sem()
        sides.append((of.value.mean(), error))
    (a, error_a), (b, error_b) = sides
    return bool(abs(a - b) <= 1.96 * np.hypot(error_a, error_b))  # without errors this is false


def _lose(rows: pd.DataFrame, of: pd.DataFrame, values: dict[str, np.ndarray], dense: np.ndarray) -> None:
    """Write nats above dense with their interval; of the mean over seeds."""
    for method, index in of.groupby("method", sort=False).groups.items():
        mine = values.get(method)
        if method == "dense" or mine is None or mine.shape[1] != dense.shape[1]:
            continue
        gap = seeds.difference([mine], [dense])
        rows.loc[index, ["loss", "loss_low", "loss_high"]] = [gap.value, gap.low, gap.high]


def _by_column(singles: pd.DataFrame | None) -> dict[Hashable, dict[str, np.ndarray]]:
    """Values [seeds, windows or items] by model, metric, tokens and target, by method."""
    out: dict[Hashable, dict[str, np.ndarray]] = {}
    if singles is None:
        return out
    keys = ["model", "metric", "tokens", "target", "method"]
    for key, group in singles.groupby(keys, sort=False):
        values = seeds.by_seed(group, "item").to_numpy().T
        if np.isfinite(values).all():
            out.setdefault(key[:-1], {})[key[-1]] = values
    return out


def _holds_zero(low: float, high: float) -> bool:
    return low <= 0.0 <= high
