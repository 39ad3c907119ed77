"""Draws the picture that matters: how good a model is left, against how much faster it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.names import RANDOM, without_format
from resting.benchmarks.report.folder import read_results, read_singles
from resting.benchmarks.report.losses import Loss, losses
from resting.benchmarks.report.plots import draw, speed
from resting.benchmarks.report.speedups import samples
from resting.sparsifier.quantised.formats import AS_IS

TEXTS = ("wikitext2", "papers", "wikipedia")
"""The first of them that was measured is drawn."""


def parts(decoded: pd.DataFrame, suite: dict[str, Any], folder: Path, machine: dict[str, Any]) -> list[str]:
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
    joined = _with_ends(joined, measured.parent / "windows.parquet", good)
    name = draw.write(speed.quality_chart(joined, machine, samples(folder)), folder, "quality-against-time")
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
    A model that was timed in a weight format takes results in that format, above the dense model as it is: that is what
    its speed is over.
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
        base = of
        if (form := _format(row)) is not None:
            if weights == RANDOM:
                of = next((name for name in dense.index if without_format(name, form) != name), of)
            base = without_format(of, form)
            if base == of or base not in dense.index:
                continue
        key = of, row["method"], row["target"]
        if key in mean.index:
            rows.append(row | {"of": of, "dataset": text, "nats": float(np.log(mean[key] / dense[base]))})
    return pd.DataFrame(rows)


def _format(row: dict[str, Any]) -> str | None:
    """The format that a model's weights were timed in; None where they were as they are."""
    form = row.get("weight_format")
    return form if isinstance(form, str) and form != AS_IS else None


def _with_ends(joined: pd.DataFrame, file: Path, good: pd.DataFrame) -> pd.DataFrame:
    """Add ``low`` and ``high``, the 95 % interval of ``nats``, where single windows are kept; NaN elsewhere.

    None is given of a weight format: its windows are paired with a dense model in that format.
    """
    if not file.exists():
        return joined.assign(low=np.nan, high=np.nan)
    windows = read_singles(file)
    windows = windows[windows.tokens == good.tokens.head(1).squeeze()]
    tables = {model: losses(of, [joined.dataset.iloc[0]]) for model, of in windows.groupby("model", sort=False)}
    ends = []
    for row in joined.itertuples():
        if _format(row._asdict()) is not None:
            ends.append((np.nan, np.nan))
            continue
        table = tables.get(row.of, pd.DataFrame())
        there = row.method in table.index and row.target in table
        found = table.loc[row.method, row.target] if there else None
        ends.append((found.low, found.high) if isinstance(found, Loss) else (np.nan, np.nan))
    return joined.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
