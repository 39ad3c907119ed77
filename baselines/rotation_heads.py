"""Offers one rotation for every head of values, which costs no byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import CalibratedModel, Decoder, Original, Rotated, Site, SparsifierError, Transform


@dataclass
class RotationHeads(Rotated, Teal):
    r"""Masks like TEAL, with the input of o rotated head by head, by matrices that merge into v and o.

    .. math::
        \sum_{h \in g} E[a_h a_h^T] = R_g \Lambda R_g^T, \qquad W_v' = R_g^T W_v, \quad b_v' = R_g^T b_v, \qquad
        W_o' = W_o \, blockdiag(R_{g(h)})

    for the input a_h of o at head h, and the heads h that share the keys and values g. Attention mixes tokens and no
    channels, and so it is exact, and costs no byte. No paper has it; LaRoSA (arXiv 2507.01299) leaves o alone.

    The energy of what o reads lies in few channels then, so that more of them can rest there, and fewer elsewhere.

    Parameters
    ----------
    at_o : float
        The ratio at o over that at the other sites, with uniform ratios; at least 0.
    """

    name: ClassVar[str] = "rotation-heads"
    paper: ClassVar[str] = "a proposal of this project, after LaRoSA, arXiv 2507.01299"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    at_o: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.at_o < math.inf or (self.at_o != 1.0 and self.allocation != "uniform"):
            raise SparsifierError(f"at_o must be at least 0, and 1 with greedy ratios, got {self.at_o}")

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        even = super().ratios(calibrated, nominal)
        return even if self.at_o == 1.0 else tilted(calibrated.decoder, even, self.at_o)

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        return Transform(self.name, heads=self.bases_of_heads(calibrated))


def tilted(decoder: Decoder, ratios: Mapping[Site, float], at_o: float) -> dict[Site, float]:
    """Makes the ratio at o `at_o` times that of the other sites, at most 1, with as many weights resting in all."""
    weights = {site: decoder.elements_at(site) for site in ratios}
    resting = sum(weights[site] * ratio for site, ratio in ratios.items())
    of_o = sum(weight for site, weight in weights.items() if site.role == "o")
    others = sum(weights.values()) - of_o
    ratio = resting / (others + at_o * of_o)
    if at_o * ratio > 1.0:
        ratio = (resting - of_o) / others
    return {site: min(1.0, at_o * ratio) if site.role == "o" else ratio for site in ratios}
