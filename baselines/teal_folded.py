"""Offers TEAL on the model with folded norms, the control of every method that rotates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import FOLDED, CalibratedModel, Original, Transform, Transformed


@dataclass
class TealFolded(Transformed, Teal):
    r"""Masks like TEAL, after the weights of norms were folded into the matrices that read them.

    .. math:: keep_i = |n_i| > t, \qquad h = \gamma \odot n, \qquad W h = (W \, diag(\gamma)) n

    The model computes the same and no byte more. But scores of q, k, v, gate and up are of n in place of
    ``gamma n``: what a rotation seems to gain over TEAL may be this alone. WINA's scores do not change, since
    ``|n_i| ||gamma_i W_i|| = |gamma_i n_i| ||W_i||``.
    """

    name: ClassVar[str] = "teal-folded"
    paper: ClassVar[str] = "a control of this project"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        return FOLDED
