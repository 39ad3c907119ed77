"""Implements COUNTDOWN's M form (Cheon and others, 2025, arXiv 2505.17701, EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    Site,
    down_norms,
    neuron_statistics,
    up_scores,
)


@dataclass
class CountdownM(NeuronSparsifier):
    r"""Masks neurons by the magnitude of the up projection: the mirror image of CATS.

    .. math::
        u = W_{up} x, \qquad keep_j = |u_j| > t, \qquad t = F^{-1}_{|u|}(s), \qquad
        y = W_{down} \, (a(W_{gate} x) \odot u \odot keep)

    Up is read whole; rows of gate and columns of down rest together, so that the ceiling is the share of gate and
    down. The authors' "practical" threshold is the mean of per-token k-th values over the training splits of the
    benchmarks that they report; ours is the pooled quantile over the calibration text, as for CATS. With `topk` the
    number of neurons is exact (their "ideal").

    Source: released code, rustic-snob/COUNTDOWN e1393ae (no licence in the tree: written from the formula). The
    scaled score is ours.

    Parameters
    ----------
    scaled : bool
        Score by ``|u_j| E|g_j| ||W_down,:j||`` with g the activated gate: what the neuron is expected to do to the
        output. All is known before the mask, and costs no byte.
    """

    name: ClassVar[str] = "countdown-m"
    paper: ClassVar[str] = "Cheon and others 2025, arXiv 2505.17701; baselines/countdown.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"countdown-m-scaled": {"scaled": True}}

    scaled: bool = False

    @property
    def score(self) -> str:
        return "up"

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        found = neuron_statistics(calibrated)
        scales: dict[Site, Tensor] = self._scales(calibrated) if self.scaled else {}
        if self.topk:
            width = {site: calibrated.decoder.mlp_shape(site)[1] for site in found}
            return {s: NeuronMask("up", kept=self.kept(width[s], share), scale=scales.get(s)) for s in found}
        counts = up_scores(calibrated, scales, "countdown-m") if scales else {s: f.up for s, f in found.items()}
        return {s: NeuronMask("up", count.quantile(share), scale=scales.get(s)) for s, count in counts.items()}

    def _scales(self, calibrated: CalibratedModel) -> dict[Site, Tensor]:
        scales = {}
        for site, found in neuron_statistics(calibrated).items():
            scale = found.gate.mean_magnitude * down_norms(calibrated.decoder, site).double()
            scales[site] = (scale / scale.max().clamp_min(torch.finfo(torch.float64).tiny)).float()
        return scales
