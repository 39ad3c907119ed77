"""Finds the rows that are compared with no others: those that are not as sparse as their target says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

TOLERANCE = 0.03
"""Distance of a measured byte sparsity from its target from which on a row is not ranked. Methods that meet their
target on calibration text measure up to 0.012 elsewhere on evaluation text, and up to 0.024 on prompts of a few tokens;
SPON with another sparsifier's thresholds 0.021."""

Unranked = Mapping[tuple[str, float], str]
"""By method and target: why it is not ranked."""


def unranked(frame: pd.DataFrame) -> dict[tuple[str, float], str]:
    """Find methods that no best is chosen from, with the reason, by method and target.

    Parameters
    ----------
    frame : DataFrame
        Rows of results.csv, of one model and token policy.
    """
    found: dict[tuple[str, float], str] = {}
    said = pd.Series(reasons(frame), index=frame.index, dtype=object)
    for (method, target), of in frame.groupby(["method", "target"], sort=False):
        texts = {str(text): why for text, why in zip(of.dataset, said[of.index]) if why}
        if texts:
            text, why = next(iter(texts.items()))
            some = "" if len(texts) == of.dataset.nunique() else f" on {text}"  # elsewhere it is as sparse as it says
            found[str(method), float(target)] = f"{why}{some}"
    sparse = frame[(frame.target > 0) & frame.metric.str.endswith("_perplexity")]
    for (method, target, dataset), of in sparse.groupby(["method", "target", "dataset"], sort=False):
        lacking = int(of.value.isna().sum())
        if 0 < lacking < len(of):
            why = f"{lacking} of {len(of)} seeds have no number on {dataset}"
            found.setdefault((str(method), float(target)), why)
    return found


def reasons(frame: pd.DataFrame) -> list[str]:
    """Say of every row why it is not ranked; nothing where it is, or has no number."""
    return [_reason(row) if pd.notna(row.value) and row.target > 0 else "" for row in frame.itertuples()]


def _reason(row: Any) -> str:
    target, measured, metric = row.target, row.byte_sparsity, row.metric
    if metric.endswith(("_folded", "_on_dense")):  # of the biases; no mask is at work on a dense model
        return ""
    if pd.notna(measured) and abs(measured - target) > TOLERANCE:
        return f"measured {measured:.2f}"
    if metric.endswith("_kl") and row.value == 0.0:
        return "its KL is 0, as the dense model's"
    return ""
