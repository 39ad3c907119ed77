"""Holds wrappers against what they wrap."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from resting.benchmarks.labels import cut, wrapped
from resting.benchmarks.report.compared import seeds
from resting.benchmarks.report.table import Table, shown_target


def base_of(method: str, target: float, known: Container[tuple[str, float]]) -> str | None:
    """Find the sparsifier that a wrapper is held against at `target`; None where it is not `known`, or none is wrapped.

    ``"spon(teal), down alone"`` is held against ``"teal, down alone"`` where there is such a row, and
    ``"spon(teal, nominal)"`` against ``"teal, nominal"`` alone.
    """
    base, variant = wrapped(method), cut(method)[1]
    return next((name for name in (f"{base}, {variant}", base) if base and (name, target) in known), None)


def won_back(values: Mapping[tuple[str, float], Mapping[str, np.ndarray]], tasks: list[str], title: str) -> list[Table]:
    """Make the table of what wrappers add to what they wrap, in the mean of `tasks`.

    Parameters
    ----------
    values : mapping
        By method and target, by task: accuracies [seeds, items]; of methods that meet their target.
    tasks : list of str
    title : str
    """
    gained: dict[str, dict[float, str]] = {}
    for (method, target), of in values.items():
        base = base_of(method, target, values)
        if base is None or not tasks or any(t not in of or t not in values[base, target] for t in tasks):
            continue
        gain = seeds.difference([of[t] for t in tasks], [values[base, target][t] for t in tasks])
        ends = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]{' ≈' if gain.holds_zero else ''}"
        ends = "(no interval: too few items)" if np.isnan(gain.low) else ends
        gained.setdefault(method, {})[target] = f"{100 * gain.value:+.1f} {ends}"
    targets = sorted({target for of in gained.values() for target in of})
    if not targets:
        return []
    lines = [[method, *(of.get(target, "") for target in targets)] for method, of in gained.items()]
    caption = (
        f"Points that a wrapper adds to the sparsifier inside it, on the same items: mean of {len(tasks)} "
        f"task{'s' * (len(tasks) > 1)} above chance, with the 95 % interval; ≈: it holds 0."
    )
    return [Table(title, caption, ["", *map(shown_target, targets)], lines)]
