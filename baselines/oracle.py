"""Implements the bound of every predictor of neurons: the largest products of each token, known for free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    Site,
    down_norms,
)


@dataclass
class Oracle(NeuronSparsifier):
    r"""Keeps the neurons of the largest product of each token, as if they were known before they are read.

    .. math:: z_j = a(W_{gate} x)_j \, (W_{up} x)_j, \qquad keep = \text{the } k \text{ largest } |z_j|

    It is no method that could run: the score needs what it lets rest. No predictor of ``|z_j|`` keeps more of z, and
    so it is the line above `proxy`, `clusters` and `countdown-m`.

    Source: the training target of COUNTDOWN's D form (arXiv 2505.17701).

    Parameters
    ----------
    scaled : bool
        Score by ``|z_j| ||W_down,:j||``, the size of what a neuron adds to the output.
    """

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "the target of Cheon and others 2025, arXiv 2505.17701; baselines/oracle.py"
    is_bound: ClassVar[bool] = True

    scaled: bool = False

    @property
    def score(self) -> str:
        return "product"

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        decoder = calibrated.decoder
        return {
            site: NeuronMask(
                "product",
                kept=self.kept(decoder.mlp_shape(site)[1], share),
                scale=down_norms(decoder, site) if self.scaled else None,
            )
            for site in decoder.neuron_sites()
        }
