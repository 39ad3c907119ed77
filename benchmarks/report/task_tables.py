"""Makes the tables and the plot of tasks, from their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.cells.ranking import unranked
from resting.benchmarks.quality import intervals
from resting.benchmarks.quality.intervals import Interval
from resting.benchmarks.report.compared import seeds
from resting.benchmarks.report.compared.wrapped import won_back
from resting.benchmarks.report.plots import draw, quality
from resting.benchmarks.report.plots.chart import Chart
from resting.benchmarks.report.table import Part, Table, shown_target

TITLE = "Tasks"
Items = dict[tuple[str, float], dict[str, np.ndarray]]
"""By method and target, by task: the headline metric [seeds, items]."""


def sections(
    frame: pd.DataFrame, items: pd.DataFrame, cells: list[dict[str, Any]], title: str, folder: Path, prefix: str
) -> list[Part]:
    """Write the part of a README on tasks, and its plot.

    Parameters
    ----------
    frame, items : DataFrame
        Of one model and token policy.
    cells : list of dict
        Of provenance.json.
    """
    about = _accuracies(cells)
    values = _by_method(items, about)
    out = unranked(frame[frame.dataset.isin(about)])
    dense = values.get(("dense", 0.0))
    if dense is None:
        return []
    informative = [t for t in about if intervals.is_above_chance(dense[t].mean(0).tolist(), about[t]["chance"])]
    parts: list[Part] = [f"## {TITLE}", _introduction(frame, about, informative)]
    gaps = {key: {t: of[t] - dense[t] for t in about if t in of} for key, of in values.items()}
    if informative and len(values) > 1:
        drawn = {key: of for key, of in gaps.items() if key not in out}
        if any(target > 0 for _, target in drawn):
            level = 100 * seeds.mean([dense[t] for t in informative]).value
            name = draw.write(chart(drawn, level, informative, title), folder, f"{prefix}tasks")
            parts.append(f"![Mean accuracy of every method]({name})")
    targets = sorted({target for _, target in values} - {0.0})
    for target in targets or [0.0]:
        methods = [m for m, at in values if at in (0.0, target)]
        keys = [(m, 0.0 if m == "dense" else target) for m in dict.fromkeys(methods)]
        lines = [_line(key[0], values[key], gaps[key], about, informative) for key in keys]
        for key, line in zip(keys, lines):
            line[0] += f" ({out[key]})" if key in out else ""
        heads = [t if t in informative else f"*{t}*" for t in about]
        heads = ["", *("mean", "of all")[: len(_means(about, informative))], *heads]
        parts.append(Table(TITLE, f"At {shown_target(target)}:" if target else "", heads, lines))
    ranked = {key: of for key, of in values.items() if key not in out}
    return [*parts, *won_back(ranked, informative, TITLE), *_others(frame), *_dtypes(frame)]


def policies(items: pd.DataFrame, cells: list[dict[str, Any]], names: list[str]) -> list[Part]:
    """Compare mean accuracies under every token policy, with the paired difference to dense.

    The dense model answers alike under all of them: whichever tokens of a prompt are sparse, all of the answer's are
    scored.
    """
    about = _accuracies(cells)
    dense = _by_method(items[items.method == "dense"].drop_duplicates(["metric", "item"]), about).get(("dense", 0.0))
    if dense is None:
        return []
    informative = [t for t in about if intervals.is_above_chance(dense[t].mean(0).tolist(), about[t]["chance"])]
    found = {name: _by_method(items[items.tokens == name], about) for name in names}
    keys = [key for key in found[names[0]] if key[1] > 0 and all(key in of for of in found.values())]
    if not informative or not keys:
        return []
    lines = []
    for method, target in keys:
        of = [values[method, target] for values in found.values()]
        means = [seeds.mean([v[t] for t in informative]) for v in of]
        gaps = [seeds.mean([v[t] - dense[t] for t in informative]) for v in of]
        lines.append([method, shown_target(target), *(_shown(m, g, method) for m, g in zip(means, gaps))])
    title = "Tasks under other token policies"
    caption = f"Mean accuracy over {', '.join(informative)}, with the paired difference to dense."
    return [f"## {title}", Table(title, caption, ["", "target", *names], lines)]


def _accuracies(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What provenance says of the tasks that are measured in accuracy."""
    about: dict[str, Any] = next((cell["tasks"] for cell in cells if cell["method"] == "dense" and "tasks" in cell), {})
    return {name: of for name, of in about.items() if of["headline"].startswith("acc")}


def _introduction(frame: pd.DataFrame, about: dict[str, Any], informative: list[str]) -> str:
    n = frame[frame.metric.isin([f"{t}/{of['headline']}" for t, of in about.items()])].groupby("dataset").n.max()
    sizes = ", ".join(f"{t} {int(n[t])} of {of['available']}" for t, of in about.items() if t in n)
    near = [f"{t} ({100 * of['chance']:.0f} %)" for t, of in about.items() if t not in informative]
    chance = (
        " In *italics* are tasks on which the dense model is not above chance beyond its 95 % interval: "
        f"{', '.join(near)}. They say nothing about a sparsifier, and are left out of the first mean."
        if near
        else ""
    )
    normalised = [t for t, of in about.items() if of["headline"] == "acc_norm"]
    length = f" Length-normalised for {', '.join(normalised)}." if normalised else ""
    return (
        "Accuracy in percent on lm-eval's own tasks, with the paired difference to the dense model on the same items; "
        "≈: the 95 % interval of that difference holds 0 (bootstrap over items)."
        f"{length} Items: {sizes}; ARC, OpenBookQA and SciQ are their validation splits.{chance}"
    )


def _means(about: dict[str, Any], informative: list[str]) -> list[list[str]]:
    """Tasks of the means that are shown: those that say something, and all of them where these are more."""
    return [informative] if len(informative) == len(about) else [informative, list(about)]


def _by_method(items: pd.DataFrame, about: dict[str, Any]) -> Items:
    found: dict[tuple[str, float], dict[str, pd.DataFrame]] = {}
    for task, of in about.items():
        rows = items[items.metric == f"{task}/{of['headline']}"]
        for (method, target), group in rows.groupby(["method", "target"], sort=False):
            found.setdefault((str(method), float(target)), {})[task] = seeds.by_seed(group, "item")
    values: Items = {}
    for key, by_task in found.items():
        every = sorted({seed for table in by_task.values() for seed in table.columns})
        values[key] = {task: table.reindex(columns=every).to_numpy().T for task, table in by_task.items()}
    return values


def _line(
    method: str, of: dict[str, np.ndarray], gaps: dict[str, np.ndarray], about: dict[str, Any], informative: list[str]
) -> list[str]:
    line = [method]
    for tasks in _means(about, informative):
        known = [t for t in tasks if t in of]
        line.append(
            _shown(seeds.mean([of[t] for t in known]), seeds.mean([gaps[t] for t in known]), method)
            if known and len(known) == len(tasks)
            else "-"
        )
    for task in about:
        line.append(_shown(seeds.mean([of[task]]), seeds.mean([gaps[task]]), method) if task in of else "-")
    return line


def _shown(value: Interval, gap: Interval, method: str) -> str:
    if method == "dense":
        return f"{100 * value.value:.1f}"
    return f"{100 * value.value:.1f} ({100 * gap.value:+.1f}{' ≈' if gap.holds_zero else ''})"


def _others(frame: pd.DataFrame) -> list[Table]:
    """Make the tables of likelihoods that tasks ask for, which are no accuracies."""
    parts = []
    names = {"perplexity": "Perplexity of the last word", "nats_per_byte": "Nats a byte of the worked solution"}
    for metric in dict.fromkeys(m for m in frame.metric if m.split("/")[-1] in names):
        rows = frame[(frame.metric == metric) & frame.value.notna()]
        targets = sorted(t for t in rows.target.unique() if t > 0)
        lines = []
        for method in rows.method.unique():
            of = rows[rows.method == method].groupby("target").value.mean()
            cells = (
                [f"{of[0.0]:.3g}"] * max(1, len(targets))
                if method == "dense"
                else [f"{of[t]:.3g}" if t in of.index else "" for t in targets]
            )
            lines.append([method, *cells])
        task, _, kind = metric.partition("/")
        headers = ["", *(shown_target(t) for t in targets or [0.0])]
        parts.append(Table(TITLE, f"{names[kind]}, {task}.", headers, lines))
    return parts


def _dtypes(frame: pd.DataFrame) -> list[Table]:
    """Compare the dense model in another dtype, where the suite asks for it."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        for row in frame[frame.metric.str.endswith(f"_{dtype}") & (frame.method == "dense")].itertuples():
            same = frame[(frame.metric == row.metric.removesuffix(f"_{dtype}")) & (frame.method == "dense")]
            ends = f"{row.difference:+.4f} [{row.difference_low:+.4f}, {row.difference_high:+.4f}]"
            lines.append([row.metric.removesuffix(f"_{dtype}"), f"{same.value.iloc[0]:.4g}", f"{row.value:.4g}", ends])
        if lines:
            about = (
                "The dense model in both dtypes on the same items, and the paired difference (of perplexity in nats)."
            )
            return [Table(TITLE, about, ["", "in the suite's dtype", dtype, "difference"], lines)]
    return []


def chart(gaps: Items, dense: float, tasks: list[str], title: str) -> Chart:
    """Show the mean accuracy of every method, a panel per target that several methods have.

    Parameters
    ----------
    gaps : dict
        Differences to dense [seeds, items].
    dense : float
        Its mean accuracy in percent.
    tasks : list of str
        Of the mean.
    title : str

    Notes
    -----
    Intervals are of the paired difference to dense. Methods are rows, so that no interval lies on another one.
    """
    means = {
        key: seeds.mean([known[t] for t in tasks])
        for key, known in gaps.items()
        if key[1] > 0 and all(t in known for t in tasks)
    }
    targets = sorted({target for _, target in means})
    counts = {t: sum(at == t for _, at in means) for t in targets}
    usual = [t for t in targets if counts[t] > 1] or targets
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for (method, target), gap in means.items():
        # A target that one method alone has is named with it, beside those of the nearest panel.
        at = target if target in usual else min(usual, key=lambda t: abs(t - target))
        name = method if at == target else f"{method}, at {shown_target(target)}"
        ends = (dense + 100 * gap.value, dense + 100 * gap.low, dense + 100 * gap.high)
        rows.setdefault(f"target {shown_target(at)}", {})[name] = ends
    rows = {name: rows[name] for name in sorted(rows)}
    label = f"accuracy (%), mean of {len(tasks)} tasks, with 95 % intervals of the difference to dense"
    shown = (lambda v: f"{v:.1f}") if len(rows) == 1 else None
    return quality.dots_chart(rows, label, title, shown, False, (dense, f"dense {dense:.1f}"))
