"""Implements the top-p masks of "Universal properties of activation sparsity" (arXiv 2509.00454, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistic, Statistics


@dataclass
class TopP(Teal):
    r"""Keeps the largest inputs of every token until they hold a share p of its L1 norm.

    .. math::
        keep = \{i_1, \dots, i_k\}, \qquad |x_{i_1}| \ge |x_{i_2}| \ge \dots, \qquad
        k = \min \Big\{ k : \sum_{j \le k} |x_{i_j}| \ge p \, \|x\|_1 \Big\}

    A token whose norm lies in few channels keeps fewer of them. p is set site by site, so that over the calibration
    tokens the wanted share of inputs rests; the authors have one p.

    Source: arXiv 2509.00454 and its released code (fszatkowski/activation-sparsity-benchmarking), read as notes of the
    formula only.
    """

    name: ClassVar[str] = "top-p"
    paper: ClassVar[str] = "Universal properties of activation sparsity, arXiv 2509.00454; formula from notes"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    mask: ClassVar[str] = "top-p"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].score_quantile(ratio), mask=self.mask)
