"""Thresholds refined by the gradient of the training loss, at constant bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsifier import Rule, Site
from sparsifier.kernels.masked import kept_input
from sparsifier.rule import Vector

BAND = 0.2
"""Half width, relative to the threshold, of the band of inputs that the derivative is estimated from."""


class _Shrink(torch.autograd.Function):
    r"""``x * 1{|x| > t e^delta}``, and its derivative in delta.

    The derivative of the mask in t is a delta function at ``|x| = t``. Its expectation over tokens is estimated with a
    box: every input in the band ``|x| / t`` in ``1 -+ BAND`` counts ``-x / (2 BAND)``. The one of x is the mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, mask: RefinedMask) -> Tensor:
        ctx.mask, ctx.cutoff = mask, mask.cutoff(x.dtype)
        ctx.save_for_backward(x, delta)
        return kept_input(x, ctx.cutoff)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, delta = ctx.saved_tensors
        magnitude = x.abs()
        band = (magnitude > ctx.cutoff * (1 - BAND)) & (magnitude <= ctx.cutoff * (1 + BAND))
        slope = -_like(gradient * x * band, delta) / (2 * BAND)
        ctx.mask.add_byte_slope(-_like(band, delta) / (2 * BAND), tokens=x.numel() // x.shape[-1])
        return gradient * (magnitude > ctx.cutoff), slope, None


def _like(values: Tensor, delta: Tensor) -> Tensor:
    """`values` [..., in] summed over tokens, and over channels where `delta` is one number."""
    channels = values.flatten(0, -2).sum(0, dtype=torch.float32)
    return channels if delta.dim() else channels.sum()


class RefinedMask:
    """The mask of a rule with its threshold multiplied by ``e^delta``, as `SparseLinear.mask`.

    Parameters
    ----------
    rule : Rule
    delta : Parameter, scalar or [in]
    weight_share : float
        Share of the block linears' weights that one input channel of this site reads.
    """

    def __init__(self, rule: Rule, delta: nn.Parameter, weight_share: float) -> None:
        self.rule, self.delta, self.weight_share = rule, delta, weight_share
        self.byte_slope = torch.zeros_like(delta)

    def cutoff(self, dtype: torch.dtype) -> Vector:
        refined = scaled(self.rule, self.delta.detach()).cutoff(dtype)
        return refined.to(self.delta.device) if isinstance(refined, Tensor) else refined

    def add_byte_slope(self, slope: Tensor, tokens: int) -> None:
        """Derivative of the share of bytes that is read, in delta, from one batch."""
        self.byte_slope = slope * self.weight_share / tokens

    def __call__(self, x: Tensor) -> Tensor:
        return _Shrink.apply(x, self.delta, self)


def scaled(rule: Rule, delta: Tensor) -> Rule:
    """`rule` with its threshold times ``e^delta``."""
    factor = delta.detach().float().exp().cpu()
    if not factor.dim():
        return replace(rule, threshold=rule.threshold * float(factor))
    return replace(rule, threshold=torch.as_tensor(rule.threshold, dtype=torch.float32).cpu() * factor)


@dataclass
class ConstantBytes:
    r"""Keeps descent on thresholds from trading bytes for loss.

    At a constrained optimum ``dL/d delta_i = lambda dB/d delta_i`` with one lambda for all thresholds, B the share of
    bytes that is read. Descent is on ``dL - lambda dB``, with lambda the ratio of both gradients along the direction in
    which all thresholds move together, smoothed over steps; what a step still changes of B, all thresholds give back
    together.
    """

    smoothing: float = 0.9
    loss_slope: float = 0.0
    byte_slope: float = 0.0

    def project(self, masks: Mapping[Site, RefinedMask]) -> None:
        """Replace the gradients of all deltas."""
        keep = self.smoothing
        losses = _total(m.delta.grad for m in masks.values() if m.delta.grad is not None)
        read = _total(m.byte_slope for m in masks.values())
        self.loss_slope = keep * self.loss_slope + (1 - keep) * losses
        self.byte_slope = keep * self.byte_slope + (1 - keep) * read
        if self.byte_slope:
            for mask in masks.values():
                if mask.delta.grad is not None:
                    mask.delta.grad -= self.loss_slope / self.byte_slope * mask.byte_slope

    @torch.no_grad()
    def give_back(self, masks: Mapping[Site, RefinedMask], before: Mapping[Site, Tensor]) -> None:
        """Move all deltas by one number, so that to first order the step changed no bytes."""
        total = _total(m.byte_slope for m in masks.values())
        changed = _total(m.byte_slope * (m.delta - before[s]) for s, m in masks.items())
        if total:
            for mask in masks.values():
                mask.delta.sub_(changed / total)


def _total(values: Iterable[Tensor]) -> float:
    sums = [value.sum() for value in values]
    return float(torch.stack(sums).sum()) if sums else 0.0
