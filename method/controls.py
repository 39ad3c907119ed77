"""Offers a control that tells how much of a bias's effect is its direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from resting.sparsifier import CalibratedModel, Compensated, Plan, SparsifierError, check_own_weights


@dataclass
class RandomDirection(Compensated):
    r"""Turns each bias of the wrapped compensation into a random direction of the same length.

    .. math:: bias = \|b\|_2 \, u, \qquad u \text{ uniform on the sphere}

    Over a method without biases it changes nothing.
    """

    name: ClassVar[str] = "random-direction"
    wraps_compensated: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.inner, "thresholds", "no") != "no":
            raise SparsifierError(f"{self.name} keeps thresholds as they are; {self.inner.label} refines them")

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        found = self.inner.plan_for(calibrated)
        generator = torch.Generator().manual_seed(self.seed)
        turned = {}
        check_own_weights(found, found.rules)
        for site, rule in found.rules.items():
            if rule.bias is not None:
                direction = torch.randn(rule.bias.shape, generator=generator)
                turned[site] = rule.bias.norm().cpu() * direction / direction.norm()
        return self.matched(calibrated, lambda plan: self.with_biases(plan, turned), start=found.nominal)
