"""Attention of one token in one launch: rotary embedding, the cache's new entry, and the sum over what was seen.

It serves every decode path, dense and sparse alike, so that what differs between them is their products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

SEEN = 64
"""Earlier tokens that are looked at together."""


@triton.jit
def _rotated(a, b, gain, cos, sin, i, stored, eps, NORMED: tl.constexpr, HALF: tl.constexpr):
    """Turn the two halves of a head of a query or a key, after RMSNorm (Qwen3), by rotary embedding."""
    a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
    if NORMED:
        rate = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
        a = (a * rate).to(stored).to(tl.float32) * tl.load(gain + i).to(tl.float32)
        b = (b * rate).to(stored).to(tl.float32) * tl.load(gain + HALF + i).to(tl.float32)
        a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
    return (a * cos - b * sin).to(stored), (b * cos + a * sin).to(stored)


@triton.jit
def _seen(keys, values, first, now, i, d, HALF: tl.constexpr, SEEN: tl.constexpr):
    """Load keys, in halves, and values of the tokens from `first` on that come before `now`."""
    p = first + tl.arange(0, SEEN)
    seen = (p < now)[:, None]
    places = keys + p[:, None] * 2 * HALF + i[None, :]
    low, high = tl.load(places, mask=seen, other=0.0), tl.load(places + HALF, mask=seen, other=0.0)
    return low, high, tl.load(values + p[:, None] * 2 * HALF + d[None, :], mask=seen, other=0.0)


@triton.jit
def _joined(top, total, mixed, low, high, value, q0, q1, first, now, scaling, SEEN: tl.constexpr):
    """Take more tokens into a softmax: the largest score, the sum of weights and that of weighted values."""
    scores = tl.sum(q0[None, :] * low.to(tl.float32), 1) + tl.sum(q1[None, :] * high.to(tl.float32), 1)
    scores = tl.where(first + tl.arange(0, SEEN) < now, scores * scaling, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 0))
    keep, weights = tl.exp(top - higher), tl.exp(scores - higher)
    mixed = mixed * keep + tl.sum(weights[:, None] * value.to(tl.float32), 0)
    return higher, total * keep + tl.sum(weights, 0), mixed


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    cos,
    sin,
    at,
    q_gain,
    k_gain,
    y,
    heads,
    groups,
    length,
    scaling,
    eps,
    NORMED: tl.constexpr,
    CHAINED: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    SEEN: tl.constexpr,
):
    SIZE: tl.constexpr = 2 * HALF
    stored = keys.dtype.element_ty
    head = tl.program_id(0)
    group = head // (heads // groups)
    stride = (heads + 2 * groups) * SIZE
    i, d = tl.arange(0, HALF), tl.arange(0, SIZE)
    keys += group * length * SIZE
    values += group * length * SIZE
    now = tl.load(at).to(tl.int32)
    c, s = tl.load(cos + now * SIZE + i).to(tl.float32), tl.load(sin + now * SIZE + i).to(tl.float32)
    low, high, value = _seen(keys, values, 0, now, i, d, HALF, SEEN)  # of earlier steps: needs no waiting
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    q, k = qkv + head * SIZE, qkv + (heads + group) * SIZE
    v = qkv + (heads + groups + group) * SIZE
    q0, q1 = tl.load(q + i).to(tl.float32), tl.load(q + HALF + i).to(tl.float32)
    k0, k1 = tl.load(k + i).to(tl.float32), tl.load(k + HALF + i).to(tl.float32)
    now_v = tl.load(v + d).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        q0 += tl.load(q + p * stride + i)
        q1 += tl.load(q + p * stride + HALF + i)
        k0 += tl.load(k + p * stride + i)
        k1 += tl.load(k + p * stride + HALF + i)
        now_v += tl.load(v + p * stride + d)
    now_v = now_v.to(stored)
    q0, q1 = _rotated(q0, q1, q_gain, c, s, i, stored, eps, NORMED, HALF)
    k0, k1 = _rotated(k0, k1, k_gain, c, s, i, stored, eps, NORMED, HALF)
    if head % (heads // groups) == 0:  # one of the heads that share a key writes it down; none reads it back
        tl.store(keys + now * SIZE + i, k0)
        tl.store(keys + now * SIZE + HALF + i, k1)
        tl.store(values + now * SIZE + d, now_v)
    q0, q1 = q0.to(tl.float32), q1.to(tl.float32)
    top = (tl.sum(q0 * k0.to(tl.float32), 0) + tl.sum(q1 * k1.to(tl.float32), 0)) * scaling
    top, total, mixed = _joined(top, 1.0, now_v.to(tl.float32), low, high, value, q0, q1, 0, now, scaling, SEEN)
    for first in range(SEEN, now, SEEN):
        low, high, value = _seen(keys, values, first, now, i, d, HALF, SEEN)
        top, total, mixed = _joined(top, total, mixed, low, high, value, q0, q1, first, now, scaling, SEEN)
    tl.store(y + head * SIZE + d, (mixed / total).to(stored))


@torch.library.custom_op("resting::attend", mutates_args=("keys", "values"))
def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    scaling: float,
    eps: float,
) -> Tensor:
    """Compute what the heads of one token attend to.

    Parameters
    ----------
    qkv : Tensor [n, (heads + 2 groups) size]
        Queries, keys and values of the token, side by side, as n sums that are still to be added up; `size` is a power
        of two.
    keys, values : Tensor [groups, length, size]
        Of the tokens before it; the token's own are written at place `at`.
    cos, sin : Tensor [length, size]
        Of the rotary embedding of every place; the second half of `size` repeats the first.
    at : int64 Tensor [1]
    q_gain, k_gain, eps : Tensor [size], Tensor [size], float
        RMSNorm of every query and key.
    scaling : float

    All but `qkv` and the gains is read while the launch before this one may still run, which is not to write it.

    Returns
    -------
    Tensor [1, 1, heads size]
    """
    groups, length, size = keys.shape
    heads = qkv.shape[-1] // size - 2 * groups
    y = torch.empty(1, 1, heads * size, dtype=keys.dtype, device=qkv.device)
    with cuda_overlap.on(qkv.device):
        _attend[(heads,)](
            qkv,
            keys,
            values,
            cos,
            sin,
            at,
            keys if q_gain is None else q_gain,
            keys if k_gain is None else k_gain,
            y,
            heads,
            groups,
            length,
            scaling,
            eps,
            NORMED=q_gain is not None,
            CHAINED=cuda_overlap.chained(qkv.device),
            PARTS=qkv.shape[0],
            HALF=size // 2,
            SEEN=SEEN,
            num_warps=4,
            **cuda_overlap.options(qkv.device),
        )
    return y


@attend.register_fake
def _(qkv: Tensor, keys: Tensor, *more: object) -> Tensor:
    groups, _, size = keys.shape
    return keys.new_empty(1, 1, qkv.shape[-1] - 2 * groups * size)
