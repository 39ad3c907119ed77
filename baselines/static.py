"""Lets the same input channels rest for all tokens (relative importance, after arXiv 2410.16151)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from resting.sparsifier import (
    CalibratedModel,
    DivergedError,
    Plan,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    Statistic,
    Statistics,
    folded_bias,
    run_watched,
)


@dataclass
class ChannelSums:
    """Sums up the inputs of a site in fp64: the values, their squares, and their shares of a token's contributions."""

    tokens: int = 0
    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))
    relative: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, norms: Tensor) -> None:
        """Takes up `x` [tokens, in]; `norms` [in] are those of the columns."""
        x = x.double()
        if not bool(torch.isfinite(x).all()):
            raise DivergedError("an activation is NaN or infinite on the calibration text")
        contribution = x.abs() * norms.double()
        total = contribution.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self.tokens += len(x)
        self.value = self.value + x.sum(0).cpu()
        self.square = self.square + x.square().sum(0).cpu()
        self.relative = self.relative + (contribution / total).sum(0).cpu()

    @property
    def mean(self) -> Tensor:
        """Gives E[x]."""
        return self.value / self.tokens

    @property
    def variance(self) -> Tensor:
        """Gives Var[x]."""
        return (self.square / self.tokens - self.mean.square()).clamp_min(0.0)


@dataclass
class Static(Sparsifier):
    r"""Lets the same input channels of a layer rest for all tokens: what every dynamic method must beat.

    .. math::
        I_i = E_t\Big[ \frac{|x_{ti}| \, \|W_{:,i}\|_2}{\sum_j |x_{tj}| \, \|W_{:,j}\|_2} \Big], \qquad
        M = \text{the } (1 - s) n \text{ largest}, \qquad y = W (x \odot M) \; [\, + W (E[x] \odot (1 - M)) \,]

    With the bias the error is that of the variances, ``Var(x_i) ||W_:,i||^2`` for uncorrelated inputs, which is then
    the score that matches: `static-bias` has it. Expected to be poor alone. The number of channels is exact without
    `topk`, which changes nothing.

    Source: ours, a control after "relative importance" (arXiv 2410.16151, abstract only: its formula is not known).

    Parameters
    ----------
    bias : bool
        Put the mean of what rests in its place.
    importance : {"relative", "variance"}
    """

    name: ClassVar[str] = "static"
    paper: ClassVar[str] = "ours, a control after arXiv 2410.16151; baselines/static.py"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"static-bias": {"bias": True, "importance": "variance"}}

    bias: bool = False
    importance: Literal["relative", "variance"] = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in ("relative", "variance"):
            raise SparsifierError(f"importance must be relative or variance, got {self.importance!r}")

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        raise SparsifierError("a static mask needs sums over calibration text: ask for a plan")

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        decoder = calibrated.decoder
        decoder.check_roles(self.roles)
        ratios = self.ratios(calibrated, nominal)
        found = self._sums(calibrated) if nominal else {}
        rules = {
            site: self._rule(calibrated, site, found[site], r) if nominal else Rule() for site, r in ratios.items()
        }
        info = {"ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()}}
        return Plan(rules, self.label, self.target, nominal, *calibrated.identity, info)

    def _rule(self, calibrated: CalibratedModel, site: Site, sums: ChannelSums, ratio: float) -> Rule:
        norms = calibrated.statistics(self.needs).column_norms(site).double()
        score = sums.relative if self.importance == "relative" else sums.variance * norms.square()
        kept = min(len(score), round((1.0 - ratio) * len(score)))
        mask = torch.zeros(len(score))
        mask[score.topk(kept).indices] = 1.0
        resting = sums.mean * (1.0 - mask.double())
        bias = folded_bias(calibrated.decoder, site, resting) if self.bias else None
        return Rule(scale=mask, bias=bias)

    def _sums(self, calibrated: CalibratedModel) -> dict[Site, ChannelSums]:
        key = f"static {calibrated.calibration.statistics_policy}"
        if key not in calibrated.cached:
            statistics = calibrated.statistics(self.needs)
            sites = calibrated.decoder.sites(self.roles)
            norms = {site: statistics.column_norms(site) for site in sites}
            found = {site: ChannelSums() for site in sites}

            def see(site: Site, x: Tensor) -> None:
                found[site].add(x, norms[site].to(x.device))

            run_watched(calibrated.model, calibrated.calibration, sites, see, "static", calibrated.on_progress)
            if missed := [site for site, sums in found.items() if not sums.tokens]:
                raise SparsifierError(f"no token of the calibration text came to {missed[0]}: it has no importance")
            calibrated.cached[key] = found
        return calibrated.cached[key]
