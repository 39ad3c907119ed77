"""Implements WINA with the rotation of the model that its authors put before it (arXiv 2505.19427)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from resting.baselines.wina import RELEASED, Wina
from resting.sparsifier import (
    CalibratedModel,
    Rotated,
    Site,
    SparsifierError,
    Transform,
    UnsupportedModelError,
    on_folded,
    right_singular_basis,
)


@dataclass
class WinaRotated(Rotated, Wina):
    r"""Rotates what attention and the MLP read so that columns of k and gate are orthogonal, then masks like WINA.

    .. math::
        W_k \, diag(\gamma) = U \Sigma V^T, \quad Q = V, \qquad (W_k Q)^T (W_k Q) = \Sigma^2, \qquad
        keep_i = |x_i| \, \|W_{:,i}\|_2 > t

    for the input x = Q^T n of k, and the same with gate for the MLP: there the score is the exact error of dropping
    one input alone. As in the released code (microsoft/wina 8153dbf) column norms are in the scores of k and gate, and
    the other five are scored by ``|x_i|``. Two rotations a block leave two dense adapters, which every token reads:
    18.8 % of a block of SmolLM2-135M, 15.4 % of one of Llama-3-8B. They count here; how the authors count them is not
    known.

    Parameters
    ----------
    adapters : {"counted", "free"}
        Whether their bytes count.
    """

    name: ClassVar[str] = "wina-rotated"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2505.19427; released code microsoft/wina 8153dbf"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wina-rotated-adapters-free": {"adapters": "free"}}

    norms: tuple[str, ...] = RELEASED
    adapters: Literal["counted", "free"] = "counted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters not in ("counted", "free"):
            raise SparsifierError(f"adapters must be counted or free, got {self.adapters!r}")

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        decoder = calibrated.decoder
        decoder.check_roles(RELEASED)
        sites = decoder.sites(RELEASED)
        if sites != [Site(block, role) for block in range(decoder.blocks) for role in RELEASED]:
            raise UnsupportedModelError(f"{self.name} needs a k and a gate in every block, to find its rotations by")
        found = self.bases(
            calibrated,
            len(sites),
            lambda: on_folded(calibrated, lambda: [_basis(decoder.projection(site).weight) for site in sites]),
        )
        attention, mlp = (tuple(range(first, len(sites), 2)) for first in (0, 1))
        return Transform(self.name, True, tuple(found), attention, mlp, free=self.adapters == "free")


def _basis(weight: Tensor) -> Tensor:
    return right_singular_basis(weight.detach())
