"""Adds what comes out of a part of a block to the residual stream after a norm of its own, in one launch, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait


@triton.jit
def _normed_sum(
    x,
    y,
    gain,
    out,
    squares,
    width,
    eps,
    scale,
    ROUNDS_FIRST: tl.constexpr,
    CHAINED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.arange(0, WIDTH)
    inside = i < width
    stored = x.dtype.element_ty
    weight = tl.load(gain + i, mask=inside, other=0.0).to(tl.float32)  # of the layer: needs no waiting
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    v = tl.load(y + i, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    if ROUNDS_FIRST:
        v = v.to(stored).to(tl.float32)
    v = (v * weight).to(stored).to(tl.float32)
    v = (v * scale).to(stored).to(tl.float32)
    total = (before + v).to(stored)
    tl.store(out + i, total, mask=inside)
    total = tl.where(inside, total.to(tl.float32), 0.0)
    tl.store(squares, tl.sum(total * total, 0))


@torch.library.custom_op("resting::normed_sum", mutates_args=())
def normed_sum(
    x: Tensor, y: Tensor, gain: Tensor, eps: float, rounds_first: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes ``x + scale RMSNorm(y)`` of one token.

    Parameters
    ----------
    x, y : Tensor [1, 1, width]
    gain : Tensor [width]
    eps, rounds_first : float, bool
        Of the norm, which rounds before it multiplies by the gain or does not.
    scale : float

    Returns
    -------
    Tensor [1, 1, width]
    float32 Tensor [1]
        Its sum of squares.
    """
    out, squares = torch.empty_like(x), x.new_empty(1, dtype=torch.float32)
    width = x.shape[-1]
    with cuda_overlap.on(x.device):
        _normed_sum[(1,)](
            x,
            y,
            gain,
            out,
            squares,
            width,
            eps,
            scale,
            ROUNDS_FIRST=rounds_first,
            CHAINED=cuda_overlap.chained(x.device),
            WIDTH=triton.next_power_of_2(width),
            num_warps=8,
            **cuda_overlap.options(x.device),
        )
    return out, squares


@normed_sum.register_fake
def _(x: Tensor, *more: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1, dtype=torch.float32)
