"""What tests of compiled kernels share: the formula in double precision, and memory that is not zero."""

from __future__ import annotations

import torch
from gpu_products import kept_of

ACTIVATED = {
    0: lambda v: v,
    1: lambda v: v * torch.sigmoid(v),
    2: lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    3: lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5)),
}


def poison(device):
    """Fills memory that is free, so that what is not written shows."""
    filled = [torch.full((1 << 22,), float("nan"), device=device) for _ in range(4)]
    del filled


def product_of(v, weight, layers, bias=None):
    """Masks an input in the model's dtype by each layer's rule, and multiplies in double precision."""
    parts, at = [], 0
    for width, rule in layers:
        w = weight[at : at + width].double()
        kept = kept_of(v, rule)
        y = kept @ w.T
        if rule.low_rank is not None:
            left, right = (f.to(v.device, v.dtype).double() for f in rule.low_rank)
            y = y + (v.double() - kept) @ right.T @ left.T
        parts.append(y)
        at += width
    y = torch.cat(parts)
    return y if bias is None else y + bias.to(y)


def normed(v, gain, eps, rounds_first, dtype):
    """RMSNorm of numbers in double precision, rounded where a model rounds."""
    n = v.double() * torch.rsqrt(v.double().square().mean() + eps)
    if rounds_first:
        n = n.to(dtype).double()
    return (n * gain.double()).to(dtype)


def opened(gate, up, activation, dtype):
    """Opens one half by the other, rounded where a model rounds."""
    a = ACTIVATED[activation](gate.double()).to(dtype).double()
    return (a * up.double()).to(dtype)


def near(found, wanted, slack):
    """Equal up to the rounding of the result, and `slack` for what goes into it."""
    bound = torch.finfo(found.dtype).eps * wanted.double().abs() + slack
    return bool(((found.double() - wanted.double()).abs() <= bound).all())
