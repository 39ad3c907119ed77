"""Draws the picture that matters: how good a model is left, against how much faster it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.names import RANDOM, short
from resting.benchmarks.report.folder import read_results
from resting.benchmarks.report.plots import plt, save, styles

TEXTS = ("wikitext2", "papers", "wikipedia")
"""The first of them that was measured is drawn."""
CEILING = 1.5
"""Top of a panel in nats a token: above, a model is four times as perplexed as the dense one."""


def parts(decoded: pd.DataFrame, suite: dict[str, Any], folder: Path) -> list[str]:
    """Write the section on quality against time, and its picture into `folder`; nothing without results of both."""
    source = suite["latency"].get("quality")
    measured = source and folder.parent / source / "results.csv"
    if not measured or not measured.exists() or "speedup" not in decoded:
        return []
    good = read_results(measured.parent)
    joined = join(decoded[decoded.speedup.notna()], good)
    if joined.empty:
        return []
    text, other = joined.dataset.iloc[0], joined[joined.model != joined.of]
    name = _plot(joined, folder)
    said = (
        "## Quality against time\n\nHow much is lost (log of the perplexity over the dense one, in nats a token, on "
        f"{text}, from the suite `{source}`) against how much faster a token is decoded. Down and to the right is "
        "better; a method's points are its targets."
    )
    if not other.empty:
        said += (
            f" Weights of {', '.join(sorted(set(other.model)))} are random, so that it has a time and no quality: the "
            f"quality drawn is that of {', '.join(sorted(set(other.of)))} under the same method and target."
        )
    return [said, f"![Quality against measured speed]({name})"]


def join(decoded: pd.DataFrame, good: pd.DataFrame) -> pd.DataFrame:
    """Add to rows of `decoded` the ``nats`` above dense, on ``dataset``, of the model ``of``.

    Random weights take the results of the first model that has some. So does a timed model of which it is not known
    what its weights are, if its name is not among those of `good`; other weights than those timed never do.
    """
    text = next((t for t in TEXTS if (good.metric == f"{t}_perplexity").any()), None)
    good = good[(good.metric == f"{text}_perplexity") & good.value.notna()]
    good = good[good.tokens == good.tokens.head(1).squeeze()]  # the suite's own policy comes first
    dense = good[good.method == "dense"].set_index("model").value
    if text is None or dense.empty:
        return pd.DataFrame()
    mean = good.groupby(["model", "method", "target"]).value.mean()
    known = good.drop_duplicates("model").set_index("model").weights if "weights" in good else pd.Series(dtype=object)
    rows = []
    for row in decoded.to_dict("records"):
        weights = row.get("weights")
        by_weights = {of: name for name, of in known.items() if isinstance(of, str)}
        if not isinstance(weights, str):  # timed before rows named them
            of = row["model"] if row["model"] in dense.index else dense.index[0]
        elif weights == RANDOM:
            of = dense.index[0]
        elif weights in by_weights:
            of = by_weights[weights]
        elif row["model"] in dense.index and not isinstance(known.get(row["model"]), str):
            of = row["model"]
        else:
            continue
        key = of, row["method"], row["target"]
        if key in mean.index:
            rows.append(row | {"of": of, "dataset": text, "nats": float(np.log(mean[key] / dense[of]))})
    return pd.DataFrame(rows)


def _plot(joined: pd.DataFrame, folder: Path) -> str:
    groups = list(joined.groupby(["model", "dtype", "threads"], sort=False))
    wide = min(2, len(groups))
    high = -(-len(groups) // wide)
    size = (1.2 + 4.4 * wide, 0.9 + 3.7 * high)
    figure, axes = plt.subplots(high, wide, figsize=size, sharex=True, sharey=True, squeeze=False)
    looks = styles(list(joined.method.unique()))
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((model, dtype, threads), group) in zip(axes.flat, groups):
        axis.axvline(1.0, color="0.8", linewidth=1)
        axis.plot([1.0], [0.0], color="black", marker="o", markersize=6, linestyle="none", label="dense")
        for method, look in looks.items():
            of = group[(group.method == method) & (group.nats <= CEILING)].sort_values("target")
            axis.plot(of.speedup, of.nats, label=method, markersize=4.5, linewidth=1.3, **look)
        axis.set_title(f"{short(model)}, {dtype}" + f", {threads} threads" * (threads > 1))
        axis.grid(color="0.92", linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("times faster than the fastest dense path")
    for axis in axes[:, 0]:
        axis.set_ylabel("nats a token above dense")
    axes[0][0].set_ylim(-0.05, CEILING)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return save(figure, folder, "quality-against-time")
