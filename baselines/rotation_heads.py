"""Offers one rotation for every head of values, which costs no byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import CalibratedModel, Original, Rotated, Transform


@dataclass
class RotationHeads(Rotated, Teal):
    r"""Masks like TEAL, with the input of o rotated head by head, by matrices that merge into v and o.

    .. math::
        \sum_{h \in g} E[a_h a_h^T] = R_g \Lambda R_g^T, \qquad W_v' = R_g^T W_v, \quad b_v' = R_g^T b_v, \qquad
        W_o' = W_o \, blockdiag(R_{g(h)})

    for the input a_h of o at head h, and the heads h that share the keys and values g. Attention mixes tokens and no
    channels, and so it is exact, and costs no byte. No paper has it; LaRoSA (arXiv 2507.01299) leaves o alone.
    """

    name: ClassVar[str] = "rotation-heads"
    paper: ClassVar[str] = "a proposal of this project, after LaRoSA, arXiv 2507.01299"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        return Transform(self.label, heads=self.bases_of_heads(calibrated))
