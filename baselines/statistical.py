"""Implements statistical top-k (Spark Transformer) without training: a threshold from a token's mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistic, Statistics


@dataclass
class Statistical(Teal):
    r"""Keeps the inputs of every token that lie so many standard deviations above the mean of its magnitudes.

    .. math:: keep_i = |x_i| > m_t + c \, \sigma_t

    with m and sigma the mean and the standard deviation of ``|x_i|`` over the channels of the token. It is a top-k
    without a sort: exact only where all tokens are of one distribution (``topk = true`` is the exact form). Spark
    Transformer takes ``c = Phi^-1(1 - k / n)`` of a normal distribution and trains with a soft threshold; here c is set
    site by site, so that over the calibration tokens the wanted share of inputs rests, and nothing is trained.

    Source: Spark Transformer, second hand; the use without training is this project's.
    """

    name: ClassVar[str] = "statistical"
    paper: ClassVar[str] = "after statistical top-k of Spark Transformer, second hand; without its training"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    mask: ClassVar[str] = "statistical"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].score_quantile(ratio), mask=self.mask)
