"""Predicts neurons by copies of gate and up in few bits, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    Site,
    SparsifierError,
    down_norms,
)


@dataclass
class Proxy(NeuronSparsifier):
    r"""Keeps the neurons whose product is largest by copies of gate and up in few bits.

    .. math::
        \hat x = \text{the largest } (1 - s_1) \text{ of } |x|, \qquad
        score_j = |a(\hat W_{gate} \hat x)_j \, (\hat W_{up} \hat x)_j|, \qquad
        keep = \text{the } k \text{ largest}

    The copies are rounded to the nearest of 2^b levels, symmetric around 0, in groups of 128 along the inputs; they
    are made of the model's weights when a plan is used. What a token reads of them is counted:
    ``2 d f (1 - s1) b / 16`` for the codes, and a number of 16 bits for every group. With 16 bits and s1 = 0 it is the
    oracle, at two thirds of the bytes of an MLP.

    Source: ours, after the two stages of Prox (arXiv 2607.27591, abstract only, its formula not read); one bit is
    near the sign count of SparseInfer (arXiv 2411.12692).

    Parameters
    ----------
    bits : int
        Of a weight of the copies, 1 to 16.
    rests : float
        s1, the share of the inputs that the copies are not read for.
    scaled : bool
        Weigh the score by ``||W_down,:j||``.
    """

    name: ClassVar[str] = "proxy"
    paper: ClassVar[str] = "ours, after Prox, arXiv 2607.27591; baselines/proxy.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"proxy-4": {"bits": 4}}

    bits: int = 2
    rests: float = 0.5
    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 16:
            raise SparsifierError(f"bits must be in 1 to 16, got {self.bits}")
        if not 0.0 <= self.rests < 1.0:
            raise SparsifierError(f"rests must be in [0, 1), got {self.rests}")

    @property
    def score(self) -> str:
        return "proxy"

    def extra_elements(self, hidden: int, neurons: int) -> float:
        return self._mask(0).extra_elements(hidden, neurons)

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        decoder = calibrated.decoder
        return {
            site: self._mask(
                self.kept(decoder.mlp_shape(site)[1], share), down_norms(decoder, site) if self.scaled else None
            )
            for site in decoder.neuron_sites()
        }

    def _mask(self, kept: int, scale: Any = None) -> NeuronMask:
        options = {"bits": self.bits, "rests": float(self.rests)}
        return NeuronMask("proxy", kept=kept, scale=scale, options=options)
