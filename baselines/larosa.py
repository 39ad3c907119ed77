"""Implements LaRoSA, layerwise rotated sparse activation (Liu et al., 2025, arXiv 2507.01299)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from resting.sparsifier import (
    CalibratedModel,
    Plan,
    Rotated,
    Rule,
    Site,
    SparsifierError,
    Statistics,
    TargetUnreachableError,
    Transform,
    eigenbasis,
    folded_moments,
    match,
)

ROTATED, OTHERS = 0.8, 1.2
"""Shares of the nominal sparsity at sites that are rotated, and at o and down (released code, for all models)."""


@dataclass
class LaRoSA(Rotated):
    r"""Rotates what each block reads into the eigenbasis of its second moment, and keeps the largest of every token.

    .. math::
        E[n n^T] = Q_l \Lambda Q_l^T, \qquad y = (W \, diag(\gamma) \, Q_l) \, topk_k(Q_l^T n), \qquad
        k = \lfloor (1 - s_{site}) \, in \rfloor

    with s_site = 0.8 s at q, k, v, gate and up, and 1.2 s at o and down, which are not rotated. Q_l is that of the
    attention's input n behind the norm, and serves the MLP too, as in the released code (its saved files hold two).
    Eigenvectors are computed in fp64. Between blocks one dense ``Q_l^T Q_{l+1}`` is left over, which every token
    reads: 9.4 % of a block of SmolLM2-135M, 7.7 % of one of Llama-3-8B. It counts here; the paper does not subtract
    it (known second hand).

    The weight gamma of the norm is folded into the matrices, without which the rotation could not be merged. The
    released code (alibaba/EfficientAI 3d32ae4) rotates ``gamma n``, in front of untouched weights. It keeps more than k
    where scores tie; here exactly k are kept, and at least one.

    Parameters
    ----------
    topk : bool
        With False a magnitude threshold at the same ratios, whose masks can be trained through.
    adapters : {"counted", "free"}
        Whether the bytes of the adapters count; free is what the rotation would give without its bill.
    """

    name: ClassVar[str] = "larosa"
    paper: ClassVar[str] = "Liu et al. 2025, arXiv 2507.01299; released code alibaba/EfficientAI 3d32ae4"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "larosa-adapters-free": {"adapters": "free"},
        "larosa-threshold": {"topk": False},
    }

    topk: bool = field(default=True, kw_only=True)
    adapters: Literal["counted", "free"] = "counted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters not in ("counted", "free"):
            raise SparsifierError(f"adapters must be counted or free, got {self.adapters!r}")

    @property
    def label(self) -> str:
        free = ", adapters free" if self.adapters == "free" and not self.topk else ""  # both variants at once
        return f"{self._variant}{free}{'' if self.protocol == 'common' else f', {self.protocol}'}"

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        blocks = calibrated.decoder.blocks
        found = self.bases(
            calibrated,
            blocks,
            lambda: [eigenbasis(moment) for moment in folded_moments(calibrated, "attention")["attention"]],
        )
        every = tuple(range(blocks))
        return Transform(self.name, True, tuple(found), every, every, free=self.adapters == "free")

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        return {s: min(1.0, nominal * _share(s)) for s in calibrated.decoder.sites(self.roles)}

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].quantile(ratio))

    def rule_or_topk(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        if not self.topk or ratio == 0.0:
            return self.rule(site, statistics, ratio)
        return Rule(topk=max(1, int((1.0 - ratio) * statistics.weight(site).shape[1])))

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        if self.protocol != "common":
            return self.plan_at(calibrated, self.target)
        assert calibrated.transform is not None
        decoder, ratios = calibrated.decoder, self.ratios(calibrated, 1.0)
        added = calibrated.transform.extra_elements / decoder.elements
        ceiling = sum(decoder.elements_at(site) * ratio for site, ratio in ratios.items()) / decoder.elements - added
        if self.target > ceiling:
            raise TargetUnreachableError(
                f"byte sparsity {self.target:g} is above this method's ceiling of {ceiling:.3f} on this model"
            )
        start = min(0.999, (self.target + added) / 0.94)
        plan, measured = match(lambda at: self.plan_at(calibrated, at), calibrated.measure, self.target, start)
        return replace(plan, info=plan.info | {"matched": measured, "adapters": round(added, 6)})


def _share(site: Site) -> float:
    return OTHERS if site.role in ("o", "down") else ROTATED
