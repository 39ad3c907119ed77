"""Implements the max-p masks of "Universal properties of activation sparsity" (arXiv 2509.00454, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistic, Statistics


@dataclass
class MaxP(Teal):
    r"""Keeps the inputs of every token that are at least p times its largest.

    .. math:: keep_i = |x_i| \ge p \, \max_j |x_j|

    p is set site by site, so that over the calibration tokens the wanted share of inputs rests; the authors have one p.

    Source: arXiv 2509.00454 and its released code (fszatkowski/activation-sparsity-benchmarking), read as notes of the
    formula only.
    """

    name: ClassVar[str] = "max-p"
    paper: ClassVar[str] = "Universal properties of activation sparsity, arXiv 2509.00454; formula from notes"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    mask: ClassVar[str] = "max-p"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].score_quantile(ratio), mask=self.mask)
