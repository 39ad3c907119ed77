"""Implements the score of WINA (Chen et al., 2025, arXiv 2505.19427), without its rotation of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistics


@dataclass
class Wina(Teal):
    r"""Masks inputs by what they do to the output, as far as their column of weights tells.

    .. math:: keep_i = |x_i| \, \|W_{:,i}\|_2 > t

    The authors rotate the model first, so that columns are orthogonal and the score is the exact error of dropping one
    input; they keep a fixed number of channels (`topk`). Here weights stay as they are.
    """

    name: ClassVar[str] = "wina"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wina-greedy": {"allocation": "greedy"}}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        return statistics.column_norms(site)

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        norms = statistics.column_norms(site)
        return Rule(threshold=statistics[site].score_quantile(ratio), scale=norms)
