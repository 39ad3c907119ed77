"""Defines the base of methods that add biases to the masks of another method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from resting.sparsifier.allocation import match
from resting.sparsifier.base import Sparsifier
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import DivergedError, SparsifierError
from resting.sparsifier.original import Protocol
from resting.sparsifier.plan import Plan
from resting.sparsifier.roles import LINEAR_ROLES
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Statistic, Statistics
from resting.sparsifier.transform import Transform


@dataclass
class Compensated(Sparsifier):
    """Takes the masks of another sparsifier and adds biases: the base of methods that wrap.

    Parameters
    ----------
    inner : Sparsifier
        Gives masks and target.
    sites : tuple of str
        Roles of the linear layers that get a bias.
    """

    target: float = field(init=False, default=0.0)
    topk: bool = field(init=False, default=False)
    protocol: Protocol = field(init=False, default="common")
    inner: Sparsifier
    sites: tuple[str, ...] = ("down",)

    wraps_compensated: ClassVar[bool] = False
    """Whether `inner` may add biases itself: masks are taken from the sparsifier at the bottom."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, Compensated) and not self.wraps_compensated:
            raise SparsifierError(f"{self.name} wraps a sparsifier, not what adds biases to one: {self.inner.label}")
        if self.inner.protocol == "original":
            raise SparsifierError(
                f"{self.name} follows the common protocol, got an inner method of {self.inner.protocol!r}"
            )
        if self.inner.protocol == "nominal" and getattr(self, "match", True):
            raise SparsifierError(
                f"{self.name} keeps the measured bytes at the target, which an inner method of 'nominal' does not "
                "meet; allowed: a method with match = false, or protocol = 'common'"
            )
        self.target = self.inner.target
        self.sites = tuple(self.sites)
        unknown = [s for s in self.sites if s not in LINEAR_ROLES]
        if unknown or not self.sites:
            raise SparsifierError(
                f"sites must be some of {', '.join(LINEAR_ROLES)}, got {', '.join(unknown) or 'none'}"
            )
        super().__post_init__()

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return self.inner.needs

    @property
    def needs_prompt(self) -> bool:  # type: ignore[override]
        return self.inner.needs_prompt

    @property
    def label(self) -> str:
        return f"{self._variant}({self.inner.label})"

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return self.inner.rule(site, statistics, ratio)

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        return self.inner.ratios(calibrated, nominal)

    def transform(self, calibrated: CalibratedModel) -> Transform | None:
        return self.inner.transform(calibrated)

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        plan = self.inner.plan_at(calibrated, nominal)
        calibrated.decoder.check_roles(self.sites)
        unmasked = {site: Rule() for site in calibrated.decoder.sites(self.sites)}
        return replace(plan, rules=unmasked | plan.rules, method=self.label)

    def with_biases(self, plan: Plan, biases: Mapping[Site, Tensor]) -> Plan:
        """Adds `biases` [out] to those of the rules of `plan`."""
        rules = dict(plan.rules)
        for site, bias in biases.items():
            rule = rules.get(site, Rule())
            rules[site] = replace(rule, bias=bias if rule.bias is None else rule.bias + bias)
        return replace(plan, rules=rules, method=self.label)

    def matched(self, calibrated: CalibratedModel, compensate: Callable[[Plan], Plan], start: float) -> Plan:
        """Moves the inner thresholds until the plan that `compensate` made of them measures the target.

        Biases bring the inputs of later layers nearer to the dense model's, and so larger: with the thresholds of
        the wrapped sparsifier fewer of them would rest, and part of a gain would be bought with bytes.
        """
        plan, measured = match(
            lambda nominal: compensate(self.plan_at(calibrated, nominal)),
            calibrated.measure,
            self.target,
            start,
        )
        return replace(plan, info=plan.info | {"matched": measured})


def check_own_weights(plan: Plan, sites: Iterable[Site]) -> None:
    """Refuses a plan that has weights of its own at one of `sites`: what its layers lack is no product with W.

    Raises
    ------
    SparsifierError
    """
    for site in sites:
        if plan.rules[site].weight is not None:
            raise SparsifierError(f"{plan.method} replaces the weights at {site}: its mean error is not W (x - S(x))")


def folded_bias(decoder: Decoder, site: Site, alpha: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute ``W alpha``, what input-independent activations alpha [in] add to a layer's output.

    Parameters
    ----------
    weight : Tensor [out, in], optional
        That of sparse tokens (`Rule.weight`); the model's where None.

    Returns
    -------
    Tensor [out]
        On the CPU; in fp64 for a model in fp64, else in fp32.
    """
    with torch.no_grad():
        held = decoder.projection(site).weight
        weight = held if weight is None else weight.to(held)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bias = (weight.to(dtype) @ alpha.to(weight.device).to(dtype)).cpu()
    if not bool(torch.isfinite(bias).all()):
        raise DivergedError(f"the bias at {site} is NaN, or beyond the range of {str(dtype)[6:]}")
    return bias
