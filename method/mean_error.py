"""Offers the training-free control, which adds the mean of what the masks drop as a bias."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from resting.sparsifier import (
    CalibratedModel,
    Compensated,
    Plan,
    Rule,
    Site,
    SparsifierError,
    check_own_weights,
    folded_bias,
    masked,
    run_watched,
)


@dataclass
class MeanError(Compensated):
    r"""Adds a bias that removes the mean of each layer's own sparsification error.

    .. math:: bias = W \, E[x - S(x)]

    One pass of the dense model over the calibration text. It is what the paper's stationarity condition
    ``E[W^T H (W alpha - e(X))] = 0`` gives when the Fisher metric H is replaced by the identity, and so the control
    for the question whether training by KL matters.
    """

    name: ClassVar[str] = "mean-error"

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        base = self.inner.plan_for(calibrated)
        dropped = mean_dropped(calibrated, base, self.sites)
        biases = {site: self._bias(calibrated, base.rules[site], site, mean) for site, mean in dropped.items()}
        return self.matched(calibrated, lambda plan: self.with_biases(plan, biases), start=base.nominal)

    def _bias(self, calibrated: CalibratedModel, rule: Rule, site: Site, dropped: Tensor) -> Tensor:
        bias = folded_bias(calibrated.decoder, site, dropped)
        if rule.low_rank is not None:  # U V x stands in for a part of what is dropped
            u, v = (factor.double().cpu() for factor in rule.low_rank)
            bias = bias - (u @ (v @ dropped.double().cpu())).to(bias.dtype)
        return bias if rule.bias is None else bias - rule.bias.cpu()


def mean_dropped(calibrated: CalibratedModel, plan: Plan, roles: tuple[str, ...]) -> dict[Site, Tensor]:
    """Computes E[x - S(x)] over the sparse calibration tokens of the dense model.

    Returns
    -------
    dict of Site to Tensor [in]
        For every masked site with one of `roles`, in fp64.
    """
    sums: dict[Site, Tensor] = {}
    tokens: dict[Site, int] = defaultdict(int)
    sites = [site for site, rule in plan.rules.items() if site.role in roles and not rule.masks_nothing]
    check_own_weights(plan, sites)
    unmasked = set(roles) - {site.role for site in sites}
    if unmasked and plan.target > 0:
        raise SparsifierError(
            f"{plan.method} masks no input of {', '.join(sorted(unmasked))}: nothing is dropped there"
        )

    def add(site: Site, x: Tensor) -> None:
        dropped = (x - masked(x, plan.rules[site])).double().sum(0)
        sums[site] = sums.get(site, torch.zeros_like(dropped)) + dropped
        tokens[site] += len(x)

    run_watched(
        calibrated.model,
        calibrated.calibration,
        sites,
        add,
        "mean error",
        calibrated.on_progress,
    )
    return {site: total / tokens[site] for site, total in sums.items()}
