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

NAMED = ["model", "method", "target", "seed", "tokens", "metric", "dataset"]
"""What a row is a number of."""
SETTING = ["weights", "dtype", "window", "n"]
"""On what it was measured: rows are joined where this is the same, too, and what differs is said."""
KEY = [*NAMED, *SETTING]


def compare(a: Path, b: Path) -> pd.DataFrame:
    """Put rows that both folders have side by side, and test their differences.

    Rows are joined by all that identifies them (`KEY`). What only one folder knows of, such as the weights in a folder
    without provenance.json, tells no rows apart.

    Returns
    -------
    DataFrame
        `KEY`, then a, b, difference (b - a, in the unit of the metric), low, high (95 %), ``how`` the interval was
        taken and ``changed``: whether it leaves out 0, or the values differ where there is no interval.

    Raises
    ------
    BenchmarkError
        If a folder has no results, or they have no row in common; the message says what differs.
    """
    joined = _joined(a, b)
    joined = joined[joined.value_a.notna() & joined.value_b.notna()]
    if joined.empty:
        said = "; ".join(only_in_words(a, b)) or "none of their rows has a number in both"
        raise BenchmarkError(f"{a} and {b} have no row in common ({', '.join(KEY)}): {said}")
    windows = _windows(a, b) if _evaluation(a) == _evaluation(b) else {}
    return pd.DataFrame([_difference(row, windows) for row in joined.to_dict("records")])


def only_in(a: Path, b: Path) -> tuple[int, int]:
    """Count the rows that only one of the folders has, for either."""
    joined = _joined(a, b)
    return len(_rows(a)) - joined.place_a.nunique(), len(_rows(b)) - joined.place_b.nunique()


def only_in_words(a: Path, b: Path) -> list[str]:
    """Say of the rows that only one of the folders has how they differ from those of the other, if they do."""
    left, right, joined = _rows(a), _rows(b), _joined(a, b)
    lines = []
    for mine, other, place, here, there in ((left, right, "place_a", a, b), (right, left, "place_b", b, a)):
        alone = mine[~mine.place.isin(joined[place])]
        lines += _said(alone, other, here, there)
    return lines


def _said(alone: pd.DataFrame, other: pd.DataFrame, here: Path, there: Path) -> list[str]:
    """One line for every way in which rows differ from those of the same name in the other folder."""
    if alone.empty:
        return []
    known = {key: of.iloc[0] for key, of in other.groupby(NAMED, sort=False, dropna=False)}
    counts: dict[str, int] = {}
    for _, row in alone.iterrows():
        same = known.get(tuple(row[name] for name in NAMED))
        if same is None:
            said = f"{there} has no such {_unknown(row, other)}"
        else:
            differing = [n for n in SETTING if pd.notna(row[n]) and pd.notna(same[n]) and row[n] != same[n]]
            said = ", ".join(f"{name} {_shown(row[name])}, {there} has {_shown(same[name])}" for name in differing)
        counts[said] = counts.get(said, 0) + 1
    return [f"{count} row{'s' * (count > 1)} only in {here}: {said}" for said, count in counts.items()]


def _unknown(row: pd.Series, other: pd.DataFrame) -> str:
    """The first of the names of a row that the other folder does not have at all; else the row."""
    for name in NAMED:
        if not (other[name] == row[name]).any():
            return f"{name} ({_shown(row[name])})"
    return "rows"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def text(found: pd.DataFrame, everything: bool = False) -> str:
    """Format what changed, or all rows, as a Markdown table."""
    shown = found if everything else found[found.changed]
    if shown.empty:
        return f"Nothing changed in {len(found)} rows."
    several = [name for name in ("model", "window", "n") if found[name].nunique(dropna=False) > 1]
    lines = [
        [
            *(_shown(getattr(row, name)) for name in several),
            *(row.method, f"{row.target:g}", row.seed, row.tokens, row.metric),
            *(f"{row.a:.5g}", f"{row.b:.5g}"),
            f"{row.difference:+.4g}" + ("" if np.isnan(row.low) else f" [{row.low:+.4g}, {row.high:+.4g}]"),
            row.how if row.changed else f"{row.how}, within noise",
        ]
        for row in shown.itertuples()
    ]
    heads = [*several, "method", "target", "seed", "tokens", "metric", "a", "b", "b - a", "interval"]
    return f"{int(found.changed.sum())} of {len(found)} rows changed.\n\n{markdown(lines, heads)}"


def _rows(folder: Path) -> pd.DataFrame:
    needed = [*NAMED, "dtype", "value", "stderr"]
    frame = folders.read_results(folder, needed, may_be_empty=True)
    frame = frame.reindex(columns=[*KEY, "value", "stderr"])
    return frame.assign(place=range(len(frame)))


def _joined(a: Path, b: Path) -> pd.DataFrame:
    left, right = _rows(a), _rows(b)
    joined = left.merge(right, on=NAMED, suffixes=("_a", "_b"))
    for name in SETTING:
        one, other = joined[f"{name}_a"], joined[f"{name}_b"]
        joined = joined[(one == other) | one.isna() | other.isna()]
        joined = joined.assign(**{name: joined[f"{name}_a"].where(joined[f"{name}_a"].notna(), joined[f"{name}_b"])})
    for place, folder in (("place_b", a), ("place_a", b)):  # two of one folder have the same partner
        twice = joined.duplicated(place)
        if twice.any():
            row = joined[twice].iloc[0]
            said = f"{row.method} at {row.target:g}, {row.metric}"
            raise BenchmarkError(f"{folder / 'results.csv'} has two rows of one number ({said}); allowed: one")
    return joined


def _evaluation(folder: Path) -> Any:
    """What a folder evaluates: only if that is the same are its windows those of another."""
    try:
        return folders.read_facts(folder)["suite"]["evaluation"]
    except (BenchmarkError, KeyError, TypeError):
        return folder


def _windows(a: Path, b: Path) -> dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]:
    """Values of the same windows in both folders, by what they are behind; of perplexities in nats."""
    files = [folder / "windows.parquet" for folder in (a, b)]
    if not all(file.exists() for file in files):
        return {}
    left, right = (folders.read_singles(file) for file in files)
    joined = left.merge(right, on=[*folders.SINGLE, "window"], suffixes=("_a", "_b"))
    return {
        key: (group.value_a.to_numpy(), group.value_b.to_numpy())
        for key, group in joined.groupby(folders.SINGLE, sort=False)
        if len(group) >= FEWEST
    }


def _difference(row: dict[str, Any], windows: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Test one number. Intervals of perplexities are of the difference of logs, and given in perplexity as well."""
    metric, (a, b) = row["metric"], (row["value_a"], row["value_b"])
    logs = metric.endswith("_perplexity") and min(a, b) > 0
    behind = metric.removesuffix("_perplexity") + "_nll" if logs else metric
    key = (*(row[name] for name in folders.SINGLE[:-1]), behind)
    low = high = float("nan")
    how = "no interval"
    if key in windows:
        gaps = windows[key][1] - windows[key][0]
        (low, high), how = paired_interval([gaps]), f"paired, {len(gaps)} windows"
    elif row["stderr_a"] > 0 and row["stderr_b"] > 0:
        scale = (1 / a, 1 / b) if logs else (1.0, 1.0)
        spread = 1.96 * float(np.hypot(row["stderr_a"] * scale[0], row["stderr_b"] * scale[1]))
        middle = float(np.log(b / a)) if logs else b - a
        low, high, how = middle - spread, middle + spread, "two standard errors"
    changed = not low <= 0.0 <= high if low == low else a != b
    if logs:
        low, high = a * np.expm1(low), a * np.expm1(high)
    known = {name: row[name] for name in KEY} | {"a": a, "b": b, "difference": b - a}
    return known | {"low": float(low), "high": float(high), "how": how, "changed": bool(changed)}
