"""Offers SCAP's masks around the mean of every channel: an extension of SCAP (arXiv 2412.07174) by this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistic, Statistics


@dataclass
class ScapChannel(Teal):
    r"""Masks inputs by their distance from their channel's mean, and puts that mean in the place of what rests.

    .. math::
        keep_i = |x_i - \mu_i| > t, \qquad y = W ((x - \mu) \odot keep) + W \mu, \qquad \mu = E[x]

    t is the quantile of ``|x - mu|`` over tokens and channels of the dense model. It lies between `scap`, whose mu is
    one number, and the mean error of TEAL's masks as a bias: the same bytes as any method with biases, no training.

    Source: this project's extension of SCAP, no published method.
    """

    name: ClassVar[str] = "scap-channel"
    paper: ClassVar[str] = "after SCAP, arXiv 2412.07174; the mean of every channel is this project's"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MOMENTS})
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def centre(self, site: Site, statistics: Statistics) -> Tensor | None:
        return statistics[site].moments().mean.float()

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        if ratio == 0.0:
            return Rule()
        mean, weight = statistics[site].moments().mean, statistics.weight(site)
        with torch.no_grad():
            bias = (weight.double() @ mean.to(weight.device)).float().cpu()
        return Rule(threshold=statistics[site].score_quantile(ratio), shift=mean.float(), bias=bias)
