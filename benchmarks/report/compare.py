"""Compares two results folders: what changed, and whether it is more than noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.quality.intervals import FEWEST, paired_interval
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report.table import markdown

KEY = ["model", "method", "target", "seed", "tokens", "metric"]


def compare(a: Path, b: Path) -> pd.DataFrame:
    """Put rows that both folders have side by side, and test their differences.

    Returns
    -------
    DataFrame
        `KEY`, then a, b, difference (b - a; of perplexities the difference of logs, in nats), low, high (95 %),
        ``how`` the interval was taken and ``changed``: whether it leaves out 0, or the values differ where there is
        no interval.

    Raises
    ------
    BenchmarkError
        If a folder has no results, or they have no row in common.
    """
    left, right = (_rows(folder) for folder in (a, b))
    joined = left.merge(right, on=KEY, suffixes=("_a", "_b"))
    joined = joined[joined.value_a.notna() & joined.value_b.notna()]
    if joined.empty:
        raise BenchmarkError(f"{a} and {b} have no row in common (model, method, target, seed, tokens and metric)")
    windows = _windows(a, b) if _evaluation(a) == _evaluation(b) else {}
    found = [_difference(row, windows) for row in joined.to_dict("records")]
    return pd.DataFrame(found)


def only_in(a: Path, b: Path) -> tuple[int, int]:
    """Count the rows that only one of the folders has, for either."""
    left, right = (set(_rows(folder)[KEY].itertuples(index=False, name=None)) for folder in (a, b))
    return len(left - right), len(right - left)


def text(found: pd.DataFrame, everything: bool = False) -> str:
    """Format what changed, or all rows, as a Markdown table."""
    shown = found if everything else found[found.changed]
    if shown.empty:
        return f"Nothing changed in {len(found)} rows."
    lines = [
        [
            *(row.method, f"{row.target:g}", row.seed, row.tokens, row.metric),
            *(f"{row.a:.5g}", f"{row.b:.5g}"),
            f"{row.difference:+.4g}" + ("" if np.isnan(row.low) else f" [{row.low:+.4g}, {row.high:+.4g}]"),
            row.how if row.changed else f"{row.how}, within noise",
        ]
        for row in shown.itertuples()
    ]
    heads = ["method", "target", "seed", "tokens", "metric", "a", "b", "b - a", "interval"]
    return f"{int(found.changed.sum())} of {len(found)} rows changed.\n\n{markdown(lines, heads)}"


def _rows(folder: Path) -> pd.DataFrame:
    columns = [*KEY, "value", "stderr"]
    return folders.read_table(folder / "results.csv", columns, may_be_empty=True)[columns]


def _evaluation(folder: Path) -> Any:
    """What a folder evaluates: only if that is the same are its windows those of another."""
    try:
        return folders.read_facts(folder)["suite"]["evaluation"]
    except (BenchmarkError, KeyError, TypeError):
        return folder


def _windows(a: Path, b: Path) -> dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]:
    """Values of the same windows in both folders, by `KEY`; of perplexities in nats."""
    files = [folder / "windows.parquet" for folder in (a, b)]
    if not all(file.exists() for file in files):
        return {}
    left, right = (folders.read_singles(file) for file in files)
    joined = left.merge(right, on=[*KEY, "window"], suffixes=("_a", "_b"))
    return {
        key: (group.value_a.to_numpy(), group.value_b.to_numpy())
        for key, group in joined.groupby(KEY, sort=False)
        if len(group) >= FEWEST
    }


def _difference(row: dict[str, Any], windows: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    metric, (a, b) = row["metric"], (row["value_a"], row["value_b"])
    logs = metric.endswith("_perplexity") and min(a, b) > 0
    difference = float(np.log(b / a)) if logs else b - a
    behind = metric.removesuffix("_perplexity") + "_nll" if logs else metric
    key = (*(row[name] for name in KEY[:-1]), behind)
    low = high = float("nan")
    how = "no interval"
    if key in windows:
        gaps = windows[key][1] - windows[key][0]
        (low, high), how = paired_interval([gaps]), f"paired, {len(gaps)} windows"
    elif row["stderr_a"] > 0 and row["stderr_b"] > 0:
        scale = (1 / a, 1 / b) if logs else (1.0, 1.0)
        spread = 1.96 * float(np.hypot(row["stderr_a"] * scale[0], row["stderr_b"] * scale[1]))
        low, high, how = difference - spread, difference + spread, "two standard errors"
    changed = not low <= 0.0 <= high if low == low else a != b
    known = {name: row[name] for name in KEY} | {"a": a, "b": b, "difference": difference}
    return known | {"low": float(low), "high": float(high), "how": how, "changed": bool(changed)}
