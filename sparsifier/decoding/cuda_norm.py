"""Changes an input before a product, inside the product's launch: RMSNorm, or the activated gate times up.

Every rounding is where the layers of a model have it, so that a threshold meets the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rate_of(squares, count, width, eps, COUNT: tl.constexpr):
    """Computes 1 / root mean square, from `count` sums of squares that are added up in their order."""
    i = tl.arange(0, COUNT)
    return tl.rsqrt(tl.sum(tl.load(squares + i, mask=i < count, other=0.0), 0) / width + eps)


@triton.jit
def given(x, inputs, k, inside, GATED: tl.constexpr):
    """Loads the numbers that make up the inputs `k`: themselves, and what a gate opens, `inputs` behind."""
    v = tl.load(x + k, mask=inside, other=0.0)
    opened = v
    if GATED:
        opened = tl.load(x + inputs + k, mask=inside, other=0.0)
    return v, opened


@triton.jit
def taken(v, opened, weight, rate, NORMED: tl.constexpr, GATED: tl.constexpr):
    """Computes the inputs of a product in fp32, from what was `given`.

    As they are; or after RMSNorm with the weights `weight`; or SiLU of the one, times the other.
    """
    stored = v.dtype
    v = v.to(tl.float32)
    if NORMED:
        v = ((v * rate).to(stored).to(tl.float32) * weight).to(stored).to(tl.float32)
    if GATED:
        v = (silu(v).to(stored).to(tl.float32) * opened.to(tl.float32)).to(stored).to(tl.float32)
    return v
