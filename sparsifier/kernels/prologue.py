"""What becomes of an input before a product, inside the product's launch: RMSNorm, or the activated gate times up.

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
    """1 / root mean square, from `count` sums of squares that are added up in their order."""
    i = tl.arange(0, COUNT)
    return tl.rsqrt(tl.sum(tl.load(squares + i, mask=i < count, other=0.0), 0) / width + eps)


@triton.jit
def taken(x, gain, rate, inputs, k, inside, NORMED: tl.constexpr, GATED: tl.constexpr):
    """Inputs `k` of a product, in fp32, 0 where not `inside`.

    As they are in `x`; or `x` after RMSNorm with the weights `gain`; or SiLU of `x`, times the `inputs` numbers behind.
    """
    stored = x.dtype.element_ty
    v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        weight = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        v = ((v * rate).to(stored).to(tl.float32) * weight).to(stored).to(tl.float32)
    if GATED:
        up = tl.load(x + inputs + k, mask=inside, other=0.0).to(tl.float32)
        v = (silu(v).to(stored).to(tl.float32) * up).to(stored).to(tl.float32)
    return v
