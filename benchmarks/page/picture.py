"""Prepares the data of the picture of quality against measured speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.names import short
from resting.benchmarks.page.collect import Folder, with_threads
from resting.benchmarks.page.marks import speedups
from resting.benchmarks.quality import intervals
from resting.benchmarks.report import quality_against_time
from resting.benchmarks.report.plots import styles

QUALITY = "baselines"
"""Whose perplexities are drawn where the timed suite names no other."""
CEILING = 3.0
"""Nats a token above dense: what is above is twenty times as perplexed, and not drawn."""
DASHES = {"-": "", ":": "1.5 4", "-.": "8 4 1.5 4", "--": "6 4"}


def panels(folders: list[Folder], rows: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Make one panel for every model, dtype and number of threads that was timed and has a quality.

    Parameters
    ----------
    folders : list of Folder
    rows : dict of str to DataFrame
        By name of a folder: its rows with marks.
    """
    out = []
    for folder in folders:
        source = (folder.suite.get("latency") or {}).get("quality") or QUALITY
        good = next((f for f in folders if f.name == source and not f.rows.empty), None)
        if folder.decoded is None or good is None or "speedup" not in folder.decoded:
            continue
        timed = folder.decoded[folder.decoded.speedup.notna()]
        joined = quality_against_time.join(timed, good.rows)
        if joined.empty:
            continue
        samples = speedups(folder)
        for (model, dtype, threads), group in joined.groupby(["model", "dtype", "threads"], sort=False):
            all_timed = timed[(timed.model == model) & (timed.dtype == dtype) & (timed.threads == threads)]
            without = sorted(set(all_timed.method) - set(group.method))
            panel = _panel(folder, good, rows[source], group, samples)
            out.append(panel | {"without": without, "model": model, "dtype": dtype, "threads": int(threads)})
    return out


def _panel(
    folder: Folder,
    good: Folder,
    rows: pd.DataFrame,
    group: pd.DataFrame,
    samples: dict[tuple[str, str, str, float], np.ndarray],
) -> dict[str, Any]:
    first = group.iloc[0].to_dict()
    model, dtype = str(first["model"]), str(first["dtype"])
    timed_in = with_threads(dtype, first["threads"])
    device = folder.machines[0].get("device", "cpu")
    place = folder.machines[0].get("cpu", "CPU") if device == "cpu" else device
    losses = rows[(rows.metric == f"{first['dataset']}_perplexity") & rows.loss.notna()]
    losses = losses[losses.tokens == losses.tokens.head(1).squeeze()]
    series, left_out = [], []
    for method in group.method.unique():
        points = []
        for row in group[group.method == method].sort_values("target").itertuples():
            if not row.nats <= CEILING:
                left_out.append([method, row.target, row.nats])
                continue
            same = losses[(losses.model == row.of) & (losses.method == method) & (losses.target == row.target)]
            sample = samples.get((row.model, timed_in, method, float(row.target)))
            low, high = (None, None) if sample is None else intervals.ends(sample)
            ends = [same.loss_low.iloc[0], same.loss_high.iloc[0]] if len(same) else [None, None]
            points.append([row.target, row.speedup, low, high, row.nats, *ends, row.byte_sparsity])
        if points:
            series.append({"method": method, "points": points})
    return {
        "id": f"{folder.name}/{short(model)}/{dtype}/{first['threads']}",
        "label": f"{short(model)}, {timed_in if device == 'cpu' else f'{dtype}, GPU'}",
        "place": place,
        "folder": folder.name,
        "source": good.name,
        "of": first["of"],
        "dataset": first["dataset"],
        "series": series,
        "left_out": left_out,
    }


def looks(methods: list[str], drawn: list[str]) -> dict[str, list[Any]]:
    """Choose colour, marker, whether it is filled, and dashes of every method; dashes tell those drawn apart."""
    ordered = [*drawn, *(m for m in methods if m not in drawn)]
    everywhere, there = styles(ordered), styles(drawn)
    out: dict[str, list[Any]] = {}
    for method, style in everywhere.items():
        line = there.get(method, style)["linestyle"]
        dashes = DASHES.get(line) if isinstance(line, str) else " ".join(f"{1.5 * n:g}" for n in line[1])
        filled = style.get("markerfacecolor") != "white"
        out[method] = [style["color"], style["marker"], int(filled), dashes or ""]
    return out
