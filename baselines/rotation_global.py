"""Offers one rotation of the residual stream for all blocks, which costs no byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import (
    CalibratedModel,
    Original,
    Rotated,
    Transform,
    eigenbasis,
    folded_moments,
    sum_of_moments,
)


@dataclass
class RotationGlobal(Rotated, Teal):
    r"""Masks like TEAL behind one rotation of the residual stream, which merges into weights and costs no byte.

    .. math::
        H = \sum_l \frac{E[n_l n_l^T]}{tr \, E[n_l n_l^T]} = Q \Lambda Q^T, \qquad
        y = (W \, diag(\gamma) \, Q) \, S(Q^T n), \qquad S(x)_i = x_i \, 1\{|x_i| > t\}

    over what attention and MLP of all blocks l read behind their norms, with folded gamma. LaRoSA's idea without its
    adapters: since Q is one, embedding, o, down and output layer take it up. No paper has it.

    Parameters
    ----------
    heads : bool
        Rotate the heads of values as well (`RotationHeads`).
    """

    name: ClassVar[str] = "rotation-global"
    paper: ClassVar[str] = "a proposal of this project, after LaRoSA, arXiv 2507.01299"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rotation-global-heads": {"heads": True}}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    heads: bool = False

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        rotations = self.bases(calibrated, 1, lambda: [_basis(calibrated)])
        every = (0,) * calibrated.decoder.blocks
        heads = self.bases_of_heads(calibrated) if self.heads else ()
        return Transform(self.name, True, tuple(rotations), every, every, heads)


def _basis(calibrated: CalibratedModel) -> Tensor:
    moments = folded_moments(calibrated, "attention", "mlp")
    return eigenbasis(sum_of_moments(moment for of_kind in moments.values() for moment in of_kind))
