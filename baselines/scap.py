"""Implements SCAP, statistical calibrated activation pruning (arXiv 2412.07174, ENLSP 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier import (
    LINEAR_ROLES,
    CalibratedModel,
    Plan,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    Statistic,
    Statistics,
    progressively,
)

FFN = ("gate", "up", "down")
GRID = 2000
"""Points at which the density is evaluated, between the least and the largest entry."""
NARROWER = 0.5
"""What Scott's bandwidth is multiplied by."""
NEGLIGIBLE = 1e-6
"""A centre no further from zero is none: it would cost a bias."""
JUDGED = 2048
"""Tokens, at most, that the output errors of candidates are compared on."""


@dataclass
class Scap(Sparsifier):
    r"""Masks inputs by their distance from the mode of their tensor, and puts the mode in the place of what rests.

    .. math::
        y = W ((x - \mu) \odot 1[|x - \mu| > \tau]) + \mu W 1 + b, \qquad \tau = F^{-1}_{|x - \mu|}(s)

    mu is one number a tensor: 0, the median, or the peak of a kernel density estimate (Gaussian kernel, half of Scott's
    bandwidth, 2,000 points from the least to the largest entry, a strided sample of the entries). Where `mode` is
    "best", the one of the three whose output ``W x_hat`` is nearest to ``W x`` at the wanted sparsity, on at most 2,048
    tokens. tau is interpolated linearly over all entries. A mu of at most 1e-6 is taken for 0, without a bias.

    Thresholds are progressive: those of a layer are set on inputs that the masks of all layers before it have changed.
    Attention stays dense, as the authors have it (``sites = "ffn"``), or is masked too.

    Source: the released code (IntelLabs/SCAP 4514551), read; written anew from its formulas. There a sample is of 100,
    200 or 300 thousand entries, texts are cut to 256 tokens, and first tokens are masked and counted too.

    Parameters
    ----------
    mode : {"best", "zero", "median", "kde"}
    progressive : bool
    sites : {"ffn", "all"}
    sample : int
        Entries of a tensor, at most, that median and density are estimated from.
    """

    name: ClassVar[str] = "scap"
    paper: ClassVar[str] = "SCAP, arXiv 2412.07174, ENLSP 2024; from released code"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    mode: Literal["best", "zero", "median", "kde"] = "best"
    progressive: bool = True
    sites: Literal["ffn", "all"] = "ffn"
    sample: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", ("best", "zero", "median", "kde")), ("sites", ("ffn", "all"))):
            if getattr(self, name) not in allowed:
                raise SparsifierError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.sample < 2:
            raise SparsifierError(f"sample must be at least 2, got {self.sample}")

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return FFN if self.sites == "ffn" else LINEAR_ROLES

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        raise SparsifierError(f"{self.name} sets its thresholds on inputs, layer by layer: use plan_for or plan_at")

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        calibrated.decoder.check_roles(self.roles)
        ratios = self.ratios(calibrated, nominal)

        known: list[tuple[Tensor, list[float]]] = []  # of the last tensor, which several layers may read

        def decide(site: Site, inputs: Tensor) -> Rule:
            if not known or known[0][0] is not inputs:
                known[:] = [(inputs, self.centres(inputs))]
            return self.rule_of(inputs, calibrated.decoder.projection(site).weight.detach(), ratios[site], known[0][1])

        rules = {site: Rule() for site in ratios}
        if nominal > 0.0:
            rules = progressively(calibrated, list(ratios), decide, self.progressive)
        info = {
            "ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()},
            "centres": {str(site): rule.shift for site, rule in rules.items()},
        }
        return Plan(rules, self.label, self.target, nominal, *calibrated.identity, info)

    def rule_of(self, inputs: Tensor, weight: Tensor, ratio: float, centres: list[float]) -> Rule:
        """Makes the rule of a layer with `weight` [out, in] from its `inputs` [tokens, in]: around the best centre."""
        rules = [self._around(centre, inputs, weight, ratio) for centre in centres]
        if len(rules) == 1:
            return rules[0]
        some = inputs[:: -(-len(inputs) // JUDGED)]
        return min(rules, key=lambda rule: _error(rule, some, weight))

    def centres(self, inputs: Tensor) -> list[float]:
        """Gives what mu may be for a tensor: one number, or all candidates, each once."""
        entries = inputs.flatten()
        entries = entries[:: max(1, -(-len(entries) // self.sample))].float()
        find = {
            "zero": lambda: 0.0,
            "median": lambda: float(entries.median()),
            "kde": lambda: peak(entries),
        }
        found = [find[mode]() for mode in (find if self.mode == "best" else [self.mode])]
        return list(dict.fromkeys(0.0 if abs(centre) <= NEGLIGIBLE else centre for centre in found))

    def _around(self, centre: float, inputs: Tensor, weight: Tensor, ratio: float) -> Rule:
        bias = (centre * weight.double().sum(1)).float().cpu() if centre else None
        if self.topk:
            return Rule(shift=centre, bias=bias, topk=round(inputs.shape[1] * (1.0 - ratio)))
        return Rule(threshold=quantile((inputs - centre).abs().flatten(), ratio), shift=centre, bias=bias)


def quantile(values: Tensor, ratio: float) -> float:
    """Computes the quantile of `values` [n], interpolated linearly between neighbours, at `ratio` in [0, 1]."""
    place = ratio * (len(values) - 1)
    below = math.floor(place)
    ranks = [below, min(below + 1, len(values) - 1)]
    if values.device.type == "cpu":  # one selection for both, where `kthvalue` is one each
        exact = values.float() if values.dtype is torch.bfloat16 else values  # numpy has no bfloat16
        low, high = np.partition(exact.detach().numpy(), ranks)[ranks].tolist()
    else:  # where `kthvalue` runs on a single multiprocessor
        low, high = values.sort().values[ranks].tolist()
    return low + (place - below) * (high - low)


def peak(entries: Tensor) -> float:
    """Finds where the density of `entries` [n] is highest: of equal ones their own value."""
    low, high, spread = float(entries.min()), float(entries.max()), float(entries.double().std())
    bandwidth = NARROWER * spread * len(entries) ** -0.2
    if low == high or not bandwidth > 0.0:
        return low
    grid = torch.linspace(low, high, GRID, device=entries.device)
    # What is many bandwidths away adds nothing: only sorted entries nearby are looked at.
    entries = entries.sort().values
    reach = 6.0 * bandwidth
    first = torch.searchsorted(entries, grid - reach).tolist()
    last = torch.searchsorted(entries, grid + reach, right=True).tolist()
    most = sorted(range(GRID), key=lambda i: first[i] - last[i])
    best, at = 0.0, low
    for i in most:
        if last[i] - first[i] <= best:  # a density is at most the number of entries that are near
            break
        near = (entries[first[i] : last[i]] - grid[i]) / bandwidth
        density = float((-0.5 * near.square()).exp().sum(dtype=torch.float64))
        if density > best:
            best, at = density, float(grid[i])
    return at


def _error(rule: Rule, inputs: Tensor, weight: Tensor) -> float:
    """Measures how far the output is off, for `inputs` [tokens, in] under `rule`."""
    apart = (inputs - rule.shift).float()
    if rule.topk is not None:
        least = apart.abs().topk(rule.topk, -1).values[:, -1:] if rule.topk else torch.inf
        dropped = torch.where(apart.abs() < least, apart, 0.0)
    else:
        dropped = torch.where(apart.abs() <= rule.threshold, apart, 0.0)
    return float((dropped @ weight.float().T).double().norm())
