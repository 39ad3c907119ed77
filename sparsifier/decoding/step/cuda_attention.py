"""Attention of one token in one launch, in Triton: norms, rotary embedding, the cache's new entry, and what was seen.

Several programs share a head, each with a part of the earlier tokens; the last of them to finish joins their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

SEEN = 64
"""Earlier tokens that are looked at together."""
SHARING = 8
"""Programs that share a head, where there are so many tokens."""


class HeadNorm(NamedTuple):
    """Describes the RMSNorm of every query and key, or of all queries and of all keys together."""

    q_gain: Tensor
    k_gain: Tensor
    eps: float
    rounds_first: bool
    of_all: bool


@triton.jit
def _sum(qkv, stride, unit, at, inside, PARTS: tl.constexpr):
    """Adds up the numbers at `at` of the sums that a product left; where there are no parts, they are in fixed point.

    Fixed point has two words, marks that say where the second counts, and a state (``cuda/numbers.cu``).
    """
    if PARTS == 0:
        width = (stride + 31) // 32 * 32
        word = tl.load(qkv + at, mask=inside, other=0)
        marks = tl.load(qkv + 2 * width + at // 32, mask=inside, other=0)
        wide = (marks >> (at % 32)) & 1
        high = tl.load(qkv + width + at, mask=inside & (wide != 0), other=0)
        v = (high.to(tl.int64) * 65536 + word).to(tl.float32) * unit
        state = tl.load(qkv + 2 * width + width // 32)
        v = tl.where((state & 2) != 0, float("nan"), v)
    else:
        v = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
        for p in tl.static_range(1, PARTS):
            v += tl.load(qkv + p * stride + at, mask=inside, other=0.0)
    return v


@triton.jit
def _normed(v, rate, gain, at, inside, stored, NORMED: tl.constexpr):
    """Multiplies by a rate and a gain, and rounds as the layer does."""
    if NORMED == 1:
        v = (v * rate).to(stored).to(tl.float32)
    if NORMED == 2:
        v = v * rate
    if NORMED > 0:
        v = (v * tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)).to(stored).to(tl.float32)
    return v


@triton.jit
def _turned(
    qkv,
    stride,
    unit,
    begin,
    head,
    count,
    gain,
    cos,
    sin,
    size,
    rotary,
    eps,
    stored,
    NORMED: tl.constexpr,
    OF_ALL: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    ALL: tl.constexpr,
):
    """Takes one head of a query or a key, with its norm, turned by the rotary embedding.

    The heads begin at `begin` and are `count`. Of every number that is turned its partner, half of `rotary` away, is
    taken as well.
    """
    d = tl.arange(0, SIZE)
    inside, first = d < size, d < rotary // 2
    partner = tl.where(d < rotary, tl.where(first, d + rotary // 2, d - rotary // 2), d)
    at = begin + head * size
    v = _sum(qkv, stride, unit, at + d, inside, PARTS).to(stored).to(tl.float32)
    other = _sum(qkv, stride, unit, at + partner, inside, PARTS).to(stored).to(tl.float32)
    if NORMED > 0:
        if OF_ALL:
            e = tl.arange(0, ALL)
            every = _sum(qkv, stride, unit, begin + e, e < count * size, PARTS).to(stored).to(tl.float32)
            rate = tl.rsqrt(tl.sum(every * every, 0) / (count * size) + eps)
            gain += head * size
        else:
            rate = tl.rsqrt(tl.sum(v * v, 0) / size + eps)
        v = _normed(v, rate, gain, d, inside, stored, NORMED)
        other = _normed(other, rate, gain, partner, inside, stored, NORMED)
    c = tl.load(cos + d, mask=d < rotary, other=1.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < rotary, other=0.0).to(tl.float32)
    return (v * c + tl.where(first, -other, other) * s).to(stored)


@triton.jit
def _capped(score, softcap, CAPPED: tl.constexpr):
    """Bounds scores smoothly: softcap tanh(score / softcap)."""
    if CAPPED:
        score = softcap - 2.0 * softcap / (1.0 + tl.exp(2.0 * score / softcap))
    return score


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
    partial,
    counter,
    y,
    heads,
    groups,
    length,
    size,
    rotary,
    window,
    scaling,
    softcap,
    eps,
    unit,
    NORMED: tl.constexpr,
    OF_ALL: tl.constexpr,
    CAPPED: tl.constexpr,
    CHAINED: tl.constexpr,
    PARTS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    ALL: tl.constexpr,
    SEEN: tl.constexpr,
):
    stored = keys.dtype.element_ty
    head, part = tl.program_id(0), tl.program_id(1)
    group = head // (heads // groups)
    stride = (heads + 2 * groups) * size
    d, e = tl.arange(0, SIZE), tl.arange(0, SEEN)
    inside = d < size
    now = tl.load(at).to(tl.int32)
    begin = tl.maximum(now + 1 - window, 0) // SEEN * SEEN
    sharing = tl.minimum(SHARING, tl.maximum(1, tl.cdiv(now - begin, SEEN)))
    if part >= sharing:
        if CHAINED:
            gdc_wait()
            gdc_launch_dependents()
        return
    keys += group.to(tl.int64) * length * size
    values += group.to(tl.int64) * length * size
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    cos += now * rotary
    sin += now * rotary
    q = _turned(
        qkv, stride, unit, 0, head, heads, q_gain, cos, sin, size, rotary, eps, stored, NORMED, OF_ALL, PARTS, SIZE, ALL
    )
    q = q.to(tl.float32)
    top, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    mixed = tl.zeros((SIZE,), tl.float32)
    if part == 0:
        h = heads * size
        k = _turned(
            qkv,
            stride,
            unit,
            h,
            group,
            groups,
            k_gain,
            cos,
            sin,
            size,
            rotary,
            eps,
            stored,
            NORMED,
            OF_ALL,
            PARTS,
            SIZE,
            ALL,
        )
        v = _sum(qkv, stride, unit, (heads + groups + group) * size + d, inside, PARTS).to(stored)
        if head % (heads // groups) == 0:  # one of the heads that share a key writes it down; none reads it back
            tl.store(keys + now * size + d, k, mask=inside)
            tl.store(values + now * size + d, v, mask=inside)
        top = _capped(tl.sum(q * tl.where(inside, k.to(tl.float32), 0.0), 0) * scaling, softcap, CAPPED)
        total += 1.0
        mixed = v.to(tl.float32)
    for first in range(begin + part * SEEN, now, sharing * SEEN):
        p = first + e
        seen = (p < now) & (p > now - window)
        places = p.to(tl.int64)[:, None] * size + d[None, :]
        known = seen[:, None] & inside[None, :]
        key = tl.load(keys + places, mask=known, other=0.0).to(tl.float32)
        value = tl.load(values + places, mask=known, other=0.0).to(tl.float32)
        scores = _capped(tl.sum(q[None, :] * key, 1) * scaling, softcap, CAPPED)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(tl.maximum(top, tl.max(scores, 0)), -3e38)  # all of them may be outside the window
        keep, weights = tl.exp(top - higher), tl.exp(scores - higher)
        mixed = mixed * keep + tl.sum(weights[:, None] * value, 0)
        top, total = higher, total * keep + tl.sum(weights, 0)
    last = sharing == 1
    if sharing > 1:
        mine = partial + (head * SHARING + part) * (SIZE + 2)
        tl.store(mine + d, mixed)
        tl.store(mine + SIZE, top)
        tl.store(mine + SIZE + 1, total)
        tl.debug_barrier()  # all of this program's numbers are written before it is counted
        last = tl.atomic_add(counter + head, 1, sem="acq_rel") == sharing - 1
    if last:
        if sharing > 1:
            tl.store(counter + head, 0)
            r = tl.arange(0, SHARING)
            rows = partial + (head * SHARING + r) * (SIZE + 2)
            there = r < sharing
            tops = tl.load(rows + SIZE, mask=there, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(rows + SIZE + 1, mask=there, other=0.0, cache_modifier=".cg")
            sums = tl.load(rows[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
            weights = tl.exp(tops - tl.max(tops, 0))
            mixed = tl.sum(weights[:, None] * sums, 0)
            total = tl.sum(weights * totals, 0)
        tl.store(y + head * size + d, (mixed / total).to(stored), mask=inside)


@torch.library.custom_op("resting::attend", mutates_args=("keys", "values", "counter"))
def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor,
    counter: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    norm_of_all: bool,
    rotary: int,
    window: int,
    scaling: float,
    softcap: float,
    unit: float = 0.0,
) -> Tensor:
    """Computes what the heads of one token attend to.

    Parameters
    ----------
    qkv : Tensor [n, (heads + 2 groups) size]
        Queries, keys and values of the token, side by side, as n sums that are still to be added up. If it is int32,
        [1, ...], the first words of sums in fixed point (`cuda.sums.Sums`), whose other words follow.
    keys, values : Tensor [groups, length, size]
        Of the tokens before it; the token's own are written at place `at`.
    cos, sin : Tensor [length, rotary]
        Of the rotary embedding of every place; the second half of `rotary` repeats the first.
    at : int64 Tensor [1]
    counter : int32 Tensor [heads]
        Zeros, and zeros again afterwards.
    q_gain, k_gain, eps, rounds_first, norm_of_all : Tensor, Tensor, float, bool, bool
        RMSNorm of every query and key [size], or of all queries [heads size] and all keys together; none where None.
    rotary : int
        Leading numbers of a head that are turned.
    window : int
        Tokens that the token sees, itself among them.
    scaling, softcap : float
        Of the scores; a softcap of 0 is none.
    unit : float
        Of fixed point.

    All but `qkv` and the gains is read while the launch before this one may still run, which is not to write it.

    Returns
    -------
    Tensor [1, 1, heads size]
    """
    groups, length, size = keys.shape
    heads = qkv.shape[-1] // size - 2 * groups
    wide = triton.next_power_of_2(size)
    y = torch.empty(1, 1, heads * size, dtype=keys.dtype, device=qkv.device)
    partial = torch.empty(heads * SHARING * (wide + 2), dtype=torch.float32, device=qkv.device)
    with cuda_overlap.on(qkv.device):
        _attend[(heads, SHARING)](
            qkv,
            keys,
            values,
            cos,
            sin,
            at,
            keys if q_gain is None else q_gain,
            keys if k_gain is None else k_gain,
            partial,
            counter,
            y,
            heads,
            groups,
            length,
            size,
            rotary,
            window,
            scaling,
            softcap,
            eps,
            unit,
            NORMED=0 if q_gain is None else 1 if rounds_first else 2,
            OF_ALL=norm_of_all,
            CAPPED=softcap > 0.0,
            CHAINED=cuda_overlap.chained(qkv.device),
            PARTS=0 if qkv.dtype == torch.int32 else qkv.shape[0],
            SHARING=SHARING,
            SIZE=wide,
            ALL=triton.next_power_of_2(heads * size) if norm_of_all else 1,
            SEEN=SEEN,
            num_warps=4,
            **cuda_overlap.options(qkv.device),
        )
    return y


@attend.register_fake
def _(qkv: Tensor, keys: Tensor, *more: object) -> Tensor:
    groups, _, size = keys.shape
    return keys.new_empty(1, 1, qkv.shape[-1] - 2 * groups * size)
