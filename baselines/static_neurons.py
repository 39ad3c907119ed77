"""Lets the same neurons rest for all tokens: the control of every method that chooses them anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    Site,
    down_norms,
    neuron_statistics,
)


@dataclass
class StaticNeurons(NeuronSparsifier):
    r"""Keeps the same neurons for all tokens, those that matter most on the calibration text.

    .. math:: I_j = E|z_j| \, \|W_{down,:j}\|_2, \qquad keep = \text{the } k \text{ largest } I_j

    It reads nothing beside the kept weights, and could be folded into narrower matrices.

    Source: ours, as the neuron form of a control after arXiv 2410.16151 (abstract only; its formula is not known).
    """

    name: ClassVar[str] = "static-neurons"
    paper: ClassVar[str] = "ours, a control after arXiv 2410.16151; baselines/static_neurons.py"

    @property
    def score(self) -> str:
        return "fixed"

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        masks = {}
        for site, found in neuron_statistics(calibrated).items():
            importance = found.product.mean_magnitude * down_norms(calibrated.decoder, site).double()
            keep = torch.zeros(len(importance), dtype=torch.uint8)
            keep[importance.topk(self.kept(len(importance), share)).indices] = 1
            masks[site] = NeuronMask("fixed", tensors={"keep": keep})
        return masks
