"""Plots of speed: against measured bytes, with the share of what bytes allow, and against quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.names import short
from resting.benchmarks.quality import intervals
from resting.benchmarks.report.plots.chart import Chart, Panel, Series, axis
from resting.benchmarks.report.plots.quality import BYTES, not_drawn
from resting.benchmarks.report.speedups import Key, timed_in
from resting.benchmarks.report.style import BROKEN, in_order

TIMES = "times faster than the fastest dense path"


def decode_chart(done: pd.DataFrame, machine: Mapping[str, Any], samples: Mapping[Key, np.ndarray]) -> Chart:
    """Show the speed of one model in one dtype against measured bytes, and beside it the share of its limit.

    Parameters
    ----------
    done : DataFrame
        Rows of decode.csv with a speed, of one model, dtype and number of threads.
    machine : dict
        What they were measured on.
    samples : dict
        Of speeds over steps, for the intervals.
    """
    first = done.iloc[0]
    speeds, shares = [], []
    for method in in_order(done.method):
        of = done[done.method == method].sort_values("byte_sparsity")
        ends = [found for row in of.itertuples() if (found := _ends(samples, row)) is not None]
        low, high = ([pair[i] for pair in ends] if len(ends) == len(of) else [] for i in (0, 1))
        x = of.byte_sparsity.tolist()
        speeds.append(Series(method, x, of.speedup.tolist(), low, high))
        over = [100.0 / limit for limit in of.limit]
        share = [v * o for v, o in zip(of.speedup, over)]
        shares.append(Series(method, x, share, [v * o for v, o in zip(low, over)], [v * o for v, o in zip(high, over)]))
    limit = done.sort_values("byte_sparsity")[["byte_sparsity", "limit"]].drop_duplicates("byte_sparsity")
    x_axis = axis(BYTES, done.byte_sparsity.tolist())
    panels = []
    for name, label, series in (
        ("speed", TIMES, speeds),
        ("share of the limit", "speed over the limit that bytes set (%)", shares),
    ):
        values = [v for s in series for v in (*s.y, *s.low, *s.high)]
        limits = [(float(a), float(b)) for a, b in limit.itertuples(index=False)] if name == "speed" else []
        panels.append(
            Panel(name, x_axis, axis(label, [*values, *(b for _, b in limits)], "linear"), series, limit=limits)
        )
    note = "Bands: 95 % over the steps of one run; the spread between runs is not in them." if speeds[0].low else ""
    title = f"{short(first['model'])}, {timed_in(first['dtype'], int(first['threads']), dict(machine))}"
    return Chart("lines", title, panels, 2, note)


def quality_chart(joined: pd.DataFrame, machine: Mapping[str, Any], samples: Mapping[Key, np.ndarray]) -> Chart:
    """Show what is lost against how much faster a token is: a panel per model, dtype and number of threads.

    Parameters
    ----------
    joined : DataFrame
        Rows of decode.csv with the ``nats`` above dense on ``dataset`` of the model ``of``. Where that is not the model
        that was timed, both axes name theirs.
    machine, samples
        As for `decode_chart`.
    """
    outside: dict[tuple[str, float], float] = {}
    for row in joined[joined.nats > BROKEN].itertuples():
        outside.setdefault((row.method, row.target), row.nats)
    found, spread = [], False
    kept = joined[joined.nats <= BROKEN]
    for (model, dtype, threads), group in kept.groupby(["model", "dtype", "threads"], sort=False):
        series = [Series("dense", [1.0], [0.0])]
        for method in in_order(group.method):
            of = group[group.method == method].sort_values("target")
            low, high = (of[name].tolist() if name in of and of[name].notna().all() else [] for name in ("low", "high"))
            spread = spread or bool(low)
            series.append(Series(method, of.speedup.tolist(), of.nats.tolist(), low, high))
        found.append(
            (f"{short(model)}, {timed_in(dtype, int(threads), dict(machine))}", model, group.of.iloc[0], series)
        )
    everything = [s for *_, series in found for s in series]
    x_values = [v for s in everything for v in s.x]
    y_values = [v for s in everything for v in (*s.y, *s.low, *s.high)]
    panels = []
    text = joined.dataset.iloc[0] if len(joined) else ""
    for title, model, of, series in found:
        other = of != model
        x = axis(f"{TIMES}" + (f"\nof {short(model)}" if other else ""), x_values)
        y = axis(f"nats a token above dense ({text})" + (f"\nof {short(of)}" if other else ""), y_values, "root", 9)
        panels.append(Panel(title, x, y, series))
    note = f"{not_drawn(outside)} {'Bands: 95 % of the paired difference to dense.' if spread else ''}".strip()
    return Chart("lines", "Quality against measured speed: down and to the right is better", panels, 2, note)


def _ends(samples: Mapping[Key, np.ndarray], row: Any) -> tuple[float, float] | None:
    sample = samples.get((row.model, row.dtype, int(row.threads), row.method, float(row.target)))
    return None if sample is None else intervals.ends(sample)
