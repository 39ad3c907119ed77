"""Computes products of one to four tokens on GPUs, in Triton, by many small programs that load under a mask.

Weights are kept input-major, [in, out]. A program takes a few inputs and a tile of the outputs, and asks for the rows
of its active inputs at once: there is no list of them, no counter and no program that waits for another, so that the
GPU itself balances what its multiprocessors do. Of several tokens a row is read once if it is active for any of them. A
second launch (`cuda_masked_sum`) adds the partial sums up in their order, so that every run gives the same bits; adding
them by atomic fp32 operations instead is an option, whose last bits differ from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_masked_sum import finished, results
from resting.sparsifier.decoding.cuda_norm import given, rate_of, taken
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

BYTES = 16
"""Bytes that a thread reads at once: so many threads share a row, and the others have rows of their own."""
READABLE = 32
"""Partial sums of a product that are left to who reads it: more are added up before."""


class Masked(NamedTuple):
    """Says how a product of small programs is laid out: one reads `inputs` x `outputs` weights, `times` times."""

    inputs: int
    outputs: int
    warps: int
    times: int
    atomic: int = 0
    """1 where sums are added in memory, in fp32 and in the order in which programs end: no two runs need agree."""

    def parts(self, inputs: int) -> int:
        """Counts the programs that share a tile of outputs."""
        return -(-inputs // (self.inputs * self.times))


@triton.jit
def _kept(
    x,
    token,
    inputs,
    k,
    inside,
    least,
    moved,
    weight,
    rate,
    READS_ALL: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Gives the inputs `k` of a token, 0 where they rest, and which do not."""
    v, opened = given(x + token * inputs, inputs, k, inside, GATED)
    v = taken(v, opened, weight, rate, NORMED, GATED)
    kept = inside
    if SHIFTED:
        v = (v - moved).to(x.dtype.element_ty).to(tl.float32)
    if not READS_ALL:
        kept = inside & ((tl.abs(v) <= least) == 0)  # NaN does not rest
    return tl.where(kept, v, 0.0), kept


@triton.jit
def _tokens(
    x,
    cutoff,
    shift,
    gain,
    inputs,
    k,
    inside,
    rate,
    READS_ALL: tl.constexpr,
    UNIFORM: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Gives the inputs `k` of up to four tokens, and which are active for any of them."""
    least = tl.load(cutoff) if UNIFORM else tl.load(cutoff + k, mask=inside, other=0.0)
    moved, weight = 0.0, 1.0
    if SHIFTED:
        moved = tl.load(shift + k, mask=inside, other=0.0)
    if NORMED > 0:
        weight = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    v0, active = _kept(x, 0, inputs, k, inside, least, moved, weight, rate, READS_ALL, SHIFTED, NORMED, GATED)
    v1, v2, v3 = v0, v0, v0
    if TOKENS > 1:
        v1, kept = _kept(x, 1, inputs, k, inside, least, moved, weight, rate, READS_ALL, SHIFTED, NORMED, GATED)
        active = active | kept
    if TOKENS > 2:
        v2, kept = _kept(x, 2, inputs, k, inside, least, moved, weight, rate, READS_ALL, SHIFTED, NORMED, GATED)
        active = active | kept
    if TOKENS > 3:
        v3, kept = _kept(x, 3, inputs, k, inside, least, moved, weight, rate, READS_ALL, SHIFTED, NORMED, GATED)
        active = active | kept
    return v0, v1, v2, v3, active


@triton.jit
def _rows(w, stride, k, inside, n, outputs):
    """Loads the weights ``w[k, n]`` of the inputs `inside`, else 0; they are read once, by nobody else."""
    at = w + k.to(tl.int64)[:, :, None] * stride + n[None, None, :]
    chosen = inside[:, :, None] & (n < outputs)[None, None, :]
    return tl.load(at, mask=chosen, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _product(v, rows):
    """Sums `rows` times `v` to [groups, outputs]: over the first axis, which is a thread's own."""
    return tl.sum(v[:, :, None] * rows, 0)


@triton.jit
def _put(sums, part, token, outputs, n, inside, total, TOKENS: tl.constexpr, ATOMIC: tl.constexpr):
    """Stores the sums of a token, or adds them to what other programs found."""
    if ATOMIC:
        tl.atomic_add(sums + token * outputs + n, total, mask=inside, sem="relaxed")
    else:
        tl.store(sums + (part * TOKENS + token) * outputs + n, total, mask=inside)


@triton.jit
def _masked(
    x,
    w,
    cutoff,
    shift,
    start,
    z,
    u,
    ranks,
    squares,
    gain,
    sums,
    inputs,
    outputs,
    stride,
    second,
    third,
    count_squares,
    eps,
    READS_ALL: tl.constexpr,
    UNIFORM: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    RANKED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ATOMIC: tl.constexpr,
    CHAINED: tl.constexpr,
    SQUARES: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TIMES: tl.constexpr,
):
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    layer = (tile * OUTPUTS >= second).to(tl.int32) + (tile * OUTPUTS >= third).to(tl.int32)
    shift += layer * inputs
    cutoff += layer * (1 if UNIFORM else inputs)
    # Threads of a group share a row, and groups have rows of their own: sums meet at the end only.
    lane = tl.arange(0, INPUTS // GROUPS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    if CHAINED and not RANKED:  # in this order: what begins early may count on all that was launched before this
        gdc_wait()
        gdc_launch_dependents()
    rate = 1.0
    if NORMED > 0:
        rate = rate_of(squares, count_squares, inputs, eps, SQUARES)
    s0 = tl.zeros((GROUPS, OUTPUTS), tl.float32)
    s1, s2, s3 = s0, s0, s0
    low = part * (INPUTS * TIMES)
    high = tl.minimum(low + INPUTS * TIMES, inputs)
    k = low + lane
    v0, v1, v2, v3, active = _tokens(
        x, cutoff, shift, gain, inputs, k, k < high, rate, READS_ALL, UNIFORM, SHIFTED, NORMED, GATED, TOKENS
    )
    for _ in range(TIMES):
        rows = _rows(w, stride, k, active, n, outputs)
        k += INPUTS  # what comes next is under way while these are awaited
        n0, n1, n2, n3, active = _tokens(
            x, cutoff, shift, gain, inputs, k, k < high, rate, READS_ALL, UNIFORM, SHIFTED, NORMED, GATED, TOKENS
        )
        s0 += _product(v0, rows)
        if TOKENS > 1:
            s1 += _product(v1, rows)
        if TOKENS > 2:
            s2 += _product(v2, rows)
        if TOKENS > 3:
            s3 += _product(v3, rows)
        v0, v1, v2, v3 = n0, n1, n2, n3
    if RANKED:
        if CHAINED:  # what made `z` was launched last, after all else that is read here: the two run side by side
            gdc_wait()
            gdc_launch_dependents()
        begins, rank = tl.load(ranks + 2 * layer), tl.load(ranks + 2 * layer + 1)
        for first in range(part * INPUTS, rank, parts * INPUTS):
            r = first + lane
            v0 = tl.load(z + begins + r, mask=r < rank, other=0.0)
            s0 += _product(v0, _rows(u, outputs, r, r < rank, n, outputs))
    total = tl.sum(s0, 0)
    if STARTED and part == 0:
        total += tl.load(start + n, mask=inside, other=0.0)
    _put(sums, part, 0, outputs, n, inside, total, TOKENS, ATOMIC)
    if TOKENS > 1:
        _put(sums, part, 1, outputs, n, inside, tl.sum(s1, 0), TOKENS, ATOMIC)
    if TOKENS > 2:
        _put(sums, part, 2, outputs, n, inside, tl.sum(s2, 0), TOKENS, ATOMIC)
    if TOKENS > 3:
        _put(sums, part, 3, outputs, n, inside, tl.sum(s3, 0), TOKENS, ATOMIC)


@torch.library.custom_op("resting::masked_columns", mutates_args=())
def masked_columns(
    x: Tensor,
    weight: Tensor,
    cutoff: Tensor,
    shift: Tensor | None,
    start: Tensor | None,
    begins: list[int],
    z: Tensor | None,
    u: Tensor | None,
    ranks: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    gated: int,
    residual: Tensor | None,
    scale: float,
    sums: Tensor | None,
    tokens: int,
    reads_all: bool,
    launch: list[int],
    keep_partial_sums: bool,
) -> tuple[Tensor, Tensor]:
    r"""Computes the masked products of up to four tokens, :math:`y = start + W (x - shift)_{kept} + U z`.

    Parameters
    ----------
    x : Tensor [..., in]
        Of `tokens` tokens; [..., 2 in] if `gated`.
    weight, shift, begins, z, u, ranks, squares, gain, eps, rounds_first, gated, residual, scale
        As of `cuda_triton.columns`.
    cutoff : float32 Tensor [layers, in] or [layers, 1]
        As there; one number a layer where all its inputs have the same.
    start : float32 Tensor [out], optional
    sums : float32 Tensor [tokens, out], optional
        Zeros, and zeros again afterwards: where sums are added if `Masked.atomic`.
    tokens : int
        1 to 4. More than one have no norm, gate, residual or low-rank part.
    reads_all : bool
        Read all weights, whatever the cutoffs.
    launch : list of int
        A `Masked`.
    keep_partial_sums : bool
        Leave up to `READABLE` partial sums to who reads them, in float32; more are added up to one.

    Returns
    -------
    Tensor [..., out], or float32 Tensor [n, out] if `keep_partial_sums`
    float32 Tensor [n]
        With a residual: sums of squares of the result. Else [0].
    """
    (inputs, outputs), at = weight.shape, Masked(*launch)
    parts, chained = at.parts(inputs), cuda_overlap.chained(x.device)
    if sums is None:
        sums = x.new_empty(parts, tokens, outputs, dtype=torch.float32)
    starts_here = keep_partial_sums and start is not None
    with cuda_overlap.on(x.device):
        _masked[triton.cdiv(outputs, at.outputs), parts](
            x,
            weight,
            cutoff,
            cutoff if shift is None else shift,
            cutoff if start is None else start,
            cutoff if z is None else z,
            weight if u is None else u,
            cutoff if ranks is None else ranks,
            cutoff if squares is None else squares,
            x if gain is None else gain,
            sums,
            inputs,
            outputs,
            weight.stride(0),
            *begins,
            0 if squares is None else squares.numel(),
            eps,
            READS_ALL=reads_all,
            UNIFORM=cutoff.shape[1] == 1,
            SHIFTED=shift is not None,
            STARTED=starts_here,
            RANKED=u is not None,
            NORMED=0 if squares is None else 1 if rounds_first else 2,
            GATED=gated,
            ATOMIC=at.atomic > 0,
            CHAINED=chained,
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.numel()),
            TOKENS=tokens,
            INPUTS=at.inputs,
            GROUPS=max(1, min(at.inputs, BYTES // x.element_size() * 32 * at.warps // at.outputs)),
            OUTPUTS=at.outputs,
            TIMES=at.times,
            num_warps=at.warps,
            **cuda_overlap.options(x.device),
        )
    if keep_partial_sums and not at.atomic and parts <= READABLE:
        return sums.view(parts, outputs), sums.new_empty(0)
    return finished(x, sums, None if starts_here else start, residual, scale, tokens, keep_partial_sums, at.atomic > 0)


@masked_columns.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cutoff: Tensor,
    shift: Tensor | None,
    start: Tensor | None,
    begins: list[int],
    z: Tensor | None,
    u: Tensor | None,
    ranks: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    gated: int,
    residual: Tensor | None,
    scale: float,
    sums: Tensor | None,
    tokens: int,
    reads_all: bool,
    launch: list[int],
    keep_partial_sums: bool,
) -> tuple[Tensor, Tensor]:
    (inputs, outputs), at = weight.shape, Masked(*launch)
    parts = at.parts(inputs)
    if keep_partial_sums and not at.atomic and parts <= READABLE:
        return x.new_empty(parts, outputs, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    return results(x, outputs, keep_partial_sums, residual)


def one_each(cutoff: Tensor) -> Tensor:
    """Gives cutoffs [layers, in] as [layers, 1] where the inputs of every layer have one and the same."""
    same = bool((cutoff == cutoff[:, :1]).all())
    return cutoff[:, :1].contiguous() if same else cutoff
