"""Changes an input before a product, inside the product's launch: RMSNorm, or the activated gate times up.

Every rounding is where the layers of a model have it, so that a threshold meets the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""What opens a gate: launches are told its number, from 1 on."""


@triton.jit
def activated(x, KIND: tl.constexpr):
    """Computes one of `ACTIVATIONS`."""
    if KIND == 1:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 2:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x - x / (1.0 + tl.exp(2.0 * u))  # x (1 + tanh u) / 2
    else:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return y


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
    if GATED > 0:
        opened = tl.load(x + inputs + k, mask=inside, other=0.0)
    return v, opened


@triton.jit
def taken(v, opened, weight, rate, NORMED: tl.constexpr, GATED: tl.constexpr):
    """Computes the inputs of a product in fp32, from what was `given`.

    As they are; or after RMSNorm with the weights `weight`, rounded before these (`NORMED` is 1) or not (2); or the
    activation `GATED` of the one, times the other.
    """
    stored = v.dtype
    v = v.to(tl.float32)
    if NORMED == 1:
        v = ((v * rate).to(stored).to(tl.float32) * weight).to(stored).to(tl.float32)
    elif NORMED == 2:
        v = (v * rate * weight).to(stored).to(tl.float32)
    if GATED > 0:
        v = (activated(v, GATED).to(stored).to(tl.float32) * opened.to(tl.float32)).to(stored).to(tl.float32)
    return v
