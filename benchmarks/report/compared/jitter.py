"""Marks differences that thresholds which round differently explain."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from resting.benchmarks.report.losses import Loss

MOVE, TOKENS = 0.06, 1024
"""Share of a loss by which it moves typically on so many tokens, when thresholds move by 0.02 % of themselves.

Measured by `checks.guard.text`; docs/protocol.md has the table. It falls with the square root of the tokens.
"""
SIGMAS = 2.0


class NearBest(Loss):
    """Holds a loss whose distance from the smallest jitter explains, although its interval excludes 0."""

    def __str__(self) -> str:
        return f"{super().__str__()} ~"


def explained_by_jitter(difference: float, loss: float, tokens: int) -> bool:
    """Say whether two methods that lose about `loss` may differ by `difference` through rounding alone.

    Parameters
    ----------
    difference, loss : float
        In nats a token.
    tokens : int
        How many were scored.
    """
    return abs(difference) <= abs(loss) * explained_share(tokens)


def explained_share(tokens: int) -> float:
    """Compute the share of a loss, scored on so many tokens, by which rounding alone may move it."""
    return SIGMAS * MOVE * math.sqrt(TOKENS / tokens)


def marked(table: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """Mark the losses in `table` (`losses.losses`) that jitter cannot tell from the smallest of their column."""
    if not tokens:
        return table

    def mark(column: pd.Series) -> pd.Series:
        best = next((loss.value for loss in column if isinstance(loss, Loss) and loss.best), math.nan)
        return column.map(lambda loss: _mark(loss, best, tokens))

    return table.apply(mark)


def _mark(loss: object, best: float, tokens: int) -> object:
    if not isinstance(loss, Loss) or loss.best or loss.tied or loss.unranked or np.isnan([loss.value, best]).any():
        return loss
    if not explained_by_jitter(loss.value - best, loss.value, tokens):
        return loss
    return NearBest(loss.value, loss.low, loss.high)
