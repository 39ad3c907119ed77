"""TEAL: training-free activation sparsity (Liu et al., 2024, arXiv 2408.14690)."""

from __future__ import annotations

from typing import ClassVar

from sparsifier import Rule, Site, Sparsifier, Statistics


class Teal(Sparsifier):
    r"""Magnitude thresholds on the input of every linear layer, the same ratio everywhere (TEAL-uniform).

    .. math:: keep_i = |x_i| > t, \qquad t = F^{-1}_{|x|}(s)

    with F the empirical distribution of |x| over calibration tokens and channels, one scalar a tensor (section 4).
    The authors take the quantile 0.5 + s/2 of x and assume it symmetric around 0; the quantile of |x| needs no
    such assumption.
    """

    name: ClassVar[str] = "teal"

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].quantile(ratio))
