"""Computes a metric's value from its items, and its paired difference to the dense model."""

from __future__ import annotations

import math

import numpy as np

from resting.benchmarks.quality import intervals
from resting.benchmarks.quality.perplexity import exp


def summary(metric: str, items: list[float]) -> tuple[float, float]:
    """Return the value of a metric and its standard error over items."""
    values = np.asarray(items, dtype=float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    if metric == "perplexity":  # the items are log-likelihoods
        value = exp(-float(values.mean()))
        return value, value * error
    return float(values.mean()), error


def paired(metric: str, items: list[float], dense: list[float]) -> intervals.Interval:
    """Return the difference to dense with its interval; of perplexities in nats."""
    sign = -1.0 if metric == "perplexity" else 1.0
    return intervals.difference([sign * v for v in items], [sign * v for v in dense])
