"""Estimates the magnitude of sums from weights and rules, for the scale of fixed point.

An estimate decides about precision and speed alone: sums of any size are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda.codes import Codes
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.rule import Rule

CHUNK = 512
"""Inputs whose weights are squared together."""


@torch.no_grad()
def typical_sum(weight: Tensor | Codes, rules: list[Rule], taken: Input) -> float:
    r"""Estimates the root mean square of ``W x``.

    Inputs of a norm have a mean square of 1 before its gain :math:`g`, so that the sums have
    :math:`\sqrt{\sum_k g_k^2 w_{nk}^2}`, their mean over the outputs. Of other inputs nothing is known but the
    threshold, which lies near the middle of their magnitudes; without one it is taken as 1. Of codes inputs are taken
    as if they had one mean square.
    """
    inputs = weight.shape[1]
    if taken.gain is not None:
        size = taken.gain.detach().float().to(weight.device).square()
    else:
        cutoffs = [torch.as_tensor(cutoff_of(rule, weight.dtype)).float().to(weight.device) for rule in rules]
        known = max(float(cutoff.clamp(max=1e30).mean()) for cutoff in cutoffs)
        size = torch.full((inputs,), (known or 1.0) ** 2, device=weight.device)
    if isinstance(weight, Codes):
        return weight.typical * float(size.mean().sqrt())
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for part, by in zip(weight.t().split(CHUNK), size.split(CHUNK)):
        total += (part.float().square().mean(1) * by).sum().double()
    return float(total.sqrt())
