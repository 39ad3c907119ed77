"""Means and ranks over tasks: of every method, on the tasks where the dense model is above chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.cells.ranking import unranked
from resting.benchmarks.names import short
from resting.benchmarks.page.collect import Folder
from resting.benchmarks.quality import intervals


def tables(folders: list[Folder]) -> list[dict[str, Any]]:
    """Make one table per folder and model that has tasks, with a line per method and target.

    A line is method, target, mean accuracy, the 95 % interval of its paired difference to dense added to the dense
    mean, mean rank among the methods of its target (1 is best; ties share a rank), and the accuracy of every task.
    """
    out = []
    for place, folder in enumerate(folders):
        if folder.singles is None or folder.rows.empty:
            continue
        for model, rows in folder.rows.groupby("model", sort=False):
            made = _table(rows, folder, str(model))
            if made is not None:
                out.append(made | {"folder": place, "model": model, "label": f"{short(str(model))}, {folder.name}"})
    return sorted(out, key=lambda one: -len(one["lines"]) * len(one["tasks"]))


def _table(rows: pd.DataFrame, folder: Folder, model: str) -> dict[str, Any] | None:
    cells = [c for c in folder.facts.get("cells", []) if c.get("model") == model and c["method"] == "dense"]
    about: dict[str, Any] = next((c["tasks"] for c in cells if "tasks" in c), {})
    about = {t: of for t, of in about.items() if str(of["headline"]).startswith("acc")}
    assert folder.singles is not None
    items = folder.singles[(folder.singles.model == model) & (folder.singles.tokens == rows.tokens.iloc[0])]
    values: dict[tuple[str, float], dict[str, np.ndarray]] = {}
    for task, of in about.items():
        mine = items[items.metric == f"{task}/{of['headline']}"]
        for (method, target), group in mine.groupby(["method", "target"], sort=False):
            by_item = group.groupby("item").value
            found = by_item.mean().where(by_item.count() == by_item.size()).to_numpy()
            values.setdefault((str(method), float(target)), {})[task] = found
    dense = values.get(("dense", 0.0))
    if not dense:
        return None
    tasks = [t for t in about if t in dense and intervals.is_above_chance(dense[t].tolist(), about[t]["chance"])]
    if not tasks:
        return None
    level = float(np.mean([dense[t].mean() for t in tasks]))
    out_of = unranked(rows.assign(dataset=rows.metric.str.partition("/")[0]).query("dataset in @tasks"))
    whole = {
        k: v for k, v in values.items() if k not in out_of and all(t in v and np.isfinite(v[t]).all() for t in tasks)
    }
    lines = []
    for target in sorted({t for _, t in whole if t > 0}):
        methods = [m for m, at in whole if at == target]
        scores = pd.DataFrame({m: [whole[m, target][t].mean() for t in tasks] for m in methods})
        ranks = scores.rank(axis=1, ascending=False, method="average").mean()
        for method in methods:
            gap = intervals.mean([whole[method, target][t] - dense[t] for t in tasks])
            each = [whole[method, target][t].mean() for t in tasks]
            ends = [level + gap.value, level + gap.low, level + gap.high]
            lines.append([method, target, *ends, int(gap.holds_zero), float(ranks[method]), *each])
    if not lines:
        return None
    items_of = {t: len(dense[t]) for t in tasks}
    return {"tasks": tasks, "items": items_of, "lines": lines, "dense": [level, *(dense[t].mean() for t in tasks)]}
