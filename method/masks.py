"""Defines the masks that are trained through, with derivatives in threshold and shift and across the jump."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier import Rule, Vector, kept_input

BAND = 0.2
"""Half width, relative to the threshold, of the band of inputs that its derivative is estimated from."""


class _Shrink(torch.autograd.Function):
    r"""Computes ``u * 1{|u| > c}`` with ``u = x - shift`` and ``c = t e^delta``, and its derivatives.

    The derivative in u is the mask and, at ``|u| = c``, a jump: a delta function of weight c. Automatic differentiation
    knows the mask alone, and so takes a layer's gain for the share of inputs that it keeps (a half at 0.50), although
    those are the large ones and carry nearly all of the signal. With `smoothing` w the jump is spread evenly over
    ``|u| / c`` in ``1 -+ w``: every input there counts ``1 / (2 w)`` more. The narrower, the truer and the noisier.

    The derivative in the shift is that of the kept values; what it moves across the threshold is left out.

    The derivative in delta is a jump only. Its expectation over tokens is estimated with a box as well: every input
    with ``|u| / c`` in ``1 -+ BAND`` counts ``-u / (2 BAND)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, shift: Tensor | None, mask: TrainedMask) -> Tensor:
        u = x if shift is None else x - shift.to(x.dtype)
        ctx.mask, ctx.cutoff = mask, mask.cutoff(x.dtype)
        ctx.save_for_backward(u, delta, shift)
        return kept_input(u, ctx.cutoff)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        u, delta, shift = ctx.saved_tensors
        magnitude, cutoff, smoothing = u.abs(), ctx.cutoff, ctx.mask.smoothing
        kept = gradient * (magnitude > cutoff)
        through = kept
        if smoothing:
            jump = (magnitude > cutoff * (1 - smoothing)) & (magnitude <= cutoff * (1 + smoothing))
            through = kept + gradient * jump / (2 * smoothing)
        slope = None
        if ctx.needs_input_grad[1]:
            band = (magnitude > cutoff * (1 - BAND)) & (magnitude <= cutoff * (1 + BAND))
            slope = -_like(gradient * u * band, delta) / (2 * BAND)
            ctx.mask.add_byte_slope(-_like(band, delta) / (2 * BAND), tokens=u.numel() // u.shape[-1])
        return through, slope, None if shift is None else -_like(kept, shift), None


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    """Sums `values` [..., in] over tokens, and over channels where `parameter` is one number."""
    channels = values.flatten(0, -2).sum(0, dtype=torch.float32)
    return channels if parameter.dim() else channels.sum()


class TrainedMask:
    """Stands for the mask of a rule in training, as `SparseLinear.mask`.

    Parameters
    ----------
    rule : Rule
    deltas : tuple of Tensor, scalar or [in]
        The threshold is multiplied by ``e^delta``, delta their sum. Trained are those that want a gradient.
    weight_share : float
        Share of the block linears' weights that one input channel of this site reads.
    smoothing : float
        Half width of the band over which the jump of the mask is spread in the derivative of its input; 0 for what
        automatic differentiation gives.
    shift : Parameter [in], optional
        Subtracted before the mask.
    gain : Parameter [in], optional
        What is kept is multiplied by ``1 + gain``.
    """

    def __init__(
        self,
        rule: Rule,
        deltas: tuple[Tensor, ...],
        weight_share: float,
        smoothing: float,
        shift: nn.Parameter | None = None,
        gain: nn.Parameter | None = None,
    ) -> None:
        self.rule, self.deltas, self.weight_share = rule, deltas, weight_share
        self.smoothing, self.shift, self.gain = smoothing, shift, gain
        self.byte_slope = torch.zeros_like(self.delta)
        # Held where the parameters are: nothing of a step on a GPU then waits for it.
        self._threshold = torch.as_tensor(rule.threshold, dtype=torch.float64).to(self.byte_slope.device)
        scale = torch.as_tensor(rule.scale, dtype=torch.float32)
        self._scale = None if not scale.dim() and scale == 1 else scale.to(self.byte_slope.device)

    @property
    def delta(self) -> Tensor:
        """Gives the logarithm of the factor of the threshold, scalar or [in]."""
        first, *others = self.deltas
        return sum(others, first)

    def cutoff(self, dtype: torch.dtype) -> Vector:
        """Gives the refined threshold on |x - shift|, rounded down to `dtype` as `Rule.cutoff` does."""
        with torch.no_grad():
            exact = _refined(self._threshold, self.delta)
            if self._scale is not None:
                exact = torch.where(self._scale > 0, exact / self._scale, torch.inf)
            rounded = exact.to(dtype)
            if dtype.itemsize == 2:
                rounded = torch.where(rounded.float() > exact, _below(rounded), rounded)
        return float(rounded) if not rounded.dim() and rounded.device.type == "cpu" else rounded

    def add_byte_slope(self, slope: Tensor, tokens: int) -> None:
        """Stores the derivative in delta of the share of bytes that is read, from one batch."""
        self.byte_slope = slope * self.weight_share / tokens

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields the deltas that are trained, each with the derivative in it of the share of bytes that is read.

        The first of them moves the thresholds of all channels.
        """
        for delta in self.deltas:
            if isinstance(delta, nn.Parameter):
                yield delta, self.byte_slope if delta.dim() else self.byte_slope.sum()

    def __call__(self, x: Tensor) -> Tensor:
        kept: Tensor = _Shrink.apply(x, self.delta, self.shift, self)
        # In the precision of the gains: near 1 that of bfloat16 is a hundredth.
        return kept if self.gain is None else (kept.float() * (1 + self.gain)).to(x.dtype)


def scaled(rule: Rule, delta: Tensor) -> Rule:
    """Multiplies the threshold of `rule` by ``e^delta``."""
    refined = _refined(torch.as_tensor(rule.threshold, dtype=torch.float64).cpu(), delta.detach().cpu())
    return replace(rule, threshold=refined)


def _refined(threshold: Tensor, delta: Tensor) -> Tensor:
    return (threshold * delta.float().exp().double()).float()


def _below(x: Tensor) -> Tensor:
    """Gives the next number below positive ones, of 16 bits: their bits count up as they do."""
    return (x.view(torch.int16) - 1).view(x.dtype)
