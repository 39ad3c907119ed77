"""Decode kernels on GPUs, in Triton: matrix-vector products that read only the weights of active inputs.

Weights are kept input-major, [in, out]: a warp loads one run of one input's weights, and the load of a resting input is
masked off for the whole warp. Inputs are split over programs (split-K): each writes its sums in fp32, and the last one
to finish a tile adds them up in their order, so that the result does not depend on which that is. Registered with
`torch.library`: the operators work under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a product is laid out on a device: a program reads `inputs` x `outputs` weights at a time."""

    inputs: int
    outputs: int
    warps: int
    split: int
    """Programs that share one tile of outputs, each with a part of the inputs; a power of two."""


@triton.jit
def _active(x, shift, cutoff, k, limit, RESTING: tl.constexpr, SHIFTED: tl.constexpr):
    """Inputs `k`, and which of them to read the weights of."""
    v = tl.load(x + k, mask=k < limit, other=0.0).to(tl.float32)
    if SHIFTED:
        v = (v - tl.load(shift + k, mask=k < limit, other=0.0)).to(x.dtype.element_ty).to(tl.float32)
    rests = tl.abs(v) <= tl.load(cutoff + k, mask=k < limit, other=0.0)  # NaN does not rest
    return v, (k < limit) & (rests if RESTING else rests == 0)


@triton.jit
def _rows_of(sums, v, kept, w, stride, k, n, outputs):
    """Add ``v[k] w[k, n]`` of the kept inputs to `sums` [k, n]."""
    at = w + k.to(tl.int64)[:, None] * stride + n[None, :]
    tile = tl.load(at, mask=kept[:, None] & (n < outputs)[None, :], other=0.0)
    return sums + tl.where(kept, v, 0.0)[:, None] * tile.to(tl.float32)


@triton.jit
def _columns(
    x,
    w,
    cutoff,
    shift,
    start,
    segment,
    z,
    u,
    partial,
    counter,
    y,
    inputs,
    outputs,
    stride,
    rank,
    RESTING: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    RANKED: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.load(segment + tile) * inputs
    sums = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    step = tl.cdiv(tl.cdiv(inputs, SPLIT), INPUTS) * INPUTS
    low = part * step
    high = tl.minimum(low + step, inputs)
    lane = tl.arange(0, INPUTS)
    v, kept = _active(x, shift + row, cutoff + row, low + lane, high, RESTING, SHIFTED)
    for first in range(low, high, INPUTS):
        # The next inputs are under way while the weights of these are awaited.
        v1, kept1 = _active(x, shift + row, cutoff + row, first + INPUTS + lane, high, RESTING, SHIFTED)
        sums = _rows_of(sums, v, kept, w, stride, first + lane, n, outputs)
        v, kept = v1, kept1
    if RANKED:
        for first in range(part * INPUTS, rank, SPLIT * INPUTS):
            r = first + lane
            part_z = tl.load(z + r, mask=r < rank, other=0.0)
            sums = _rows_of(sums, part_z, r < rank, u, outputs, r, n, outputs)
    total = tl.sum(sums, 0)
    if SPLIT == 1:
        if STARTED:
            total += tl.load(start + n, mask=n < outputs, other=0.0)
        tl.store(y + n, total.to(y.dtype.element_ty), mask=n < outputs)
    else:
        tl.store(partial + part * outputs + n, total, mask=n < outputs)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        if tl.atomic_add(counter + tile, 1, sem="acq_rel") == SPLIT - 1:
            p = tl.arange(0, SPLIT)
            at = partial + p[:, None] * outputs + n[None, :]
            total = tl.sum(tl.load(at, mask=(n < outputs)[None, :], other=0.0, cache_modifier=".cg"), 0)
            if STARTED:
                total += tl.load(start + n, mask=n < outputs, other=0.0)
            tl.store(y + n, total.to(y.dtype.element_ty), mask=n < outputs)
            tl.store(counter + tile, 0)


@triton.jit
def _gated_rows(
    x,
    w,
    gate,
    cutoff,
    start,
    y,
    inputs,
    outputs,
    STARTED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    a = tl.load(gate + n, mask=inside, other=0.0).to(tl.float32)
    kept = inside & ((tl.abs(a) <= tl.load(cutoff + n, mask=inside, other=0.0)) == 0)
    sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        k = first + tl.arange(0, INPUTS)
        v = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)
        at = w + n.to(tl.int64)[:, None] * inputs + k[None, :]
        tile = tl.load(at, mask=kept[:, None] & (k < inputs)[None, :], other=0.0)
        sums += v[None, :] * tile.to(tl.float32)
    up = tl.sum(sums, 1)
    if STARTED:
        up += tl.load(start + n, mask=inside, other=0.0)
    stored = y.dtype.element_ty
    product = a * up.to(stored).to(tl.float32)  # rounded where the masked form rounds
    tl.store(y + n, tl.where(kept, product, 0.0).to(stored), mask=inside)


@torch.library.custom_op("resting::columns", mutates_args=())
def columns(
    x: Tensor,
    weight: Tensor,
    cutoff: Tensor,
    shift: Tensor | None,
    start: Tensor | None,
    segment: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    counter: Tensor,
    resting: bool,
    launch: list[int],
    wide: bool,
) -> Tensor:
    r"""Masked product of one token, :math:`y = start + W (x - shift)_{kept} + U z`.

    Parameters
    ----------
    x : Tensor [..., in]
        Of one token.
    weight : Tensor [in, out]
        Every row one run; a part of wider rows is fine.
    cutoff, shift : float32 Tensor [segments, in]
        `Rule.cutoff` and `Rule.shift` of every layer whose outputs are side by side in `weight`.
    start : float32 Tensor [out], optional
        What the sums start from: a bias costs its own bytes, and no launch.
    segment : int32 Tensor [tiles]
        Row of `cutoff` of every tile of outputs.
    z, u : float32 Tensor [rank], Tensor [rank, out], optional
    counter : int32 Tensor [tiles]
        Zeros, and zeros again afterwards.
    resting : bool
        Read the weights of the resting inputs instead.
    launch : list of int
        A `Launch`.
    wide : bool
        Result in float32, not in the dtype of `x`.

    Returns
    -------
    Tensor [..., out]
    """
    (inputs, outputs), at = weight.shape, Launch(*launch)
    y = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32 if wide else x.dtype, device=x.device)
    partial = y if at.split == 1 else torch.empty(at.split, outputs, dtype=torch.float32, device=x.device)
    _columns[triton.cdiv(outputs, at.outputs), at.split](
        x,
        weight,
        cutoff,
        cutoff if shift is None else shift,
        cutoff if start is None else start,
        segment,
        cutoff if z is None else z,
        weight if u is None else u,
        partial,
        counter,
        y,
        inputs,
        outputs,
        weight.stride(0),
        0 if u is None else u.shape[0],
        RESTING=resting,
        SHIFTED=shift is not None,
        STARTED=start is not None,
        RANKED=u is not None,
        SPLIT=at.split,
        INPUTS=at.inputs,
        OUTPUTS=at.outputs,
        num_warps=at.warps,
    )
    return y


@columns.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cutoff: Tensor,
    shift: Tensor | None,
    start: Tensor | None,
    segment: Tensor,
    z: Tensor | None,
    u: Tensor | None,
    counter: Tensor,
    resting: bool,
    launch: list[int],
    wide: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1], dtype=torch.float32 if wide else x.dtype)


@torch.library.custom_op("resting::gated_rows", mutates_args=())
def gated_rows(
    x: Tensor, weight: Tensor, gate: Tensor, cutoff: Tensor, start: Tensor | None, launch: list[int]
) -> Tensor:
    r"""Rows of ``up`` under a mask of the activated gate, :math:`y = a \odot (W x + start)` where
    :math:`|a| > cutoff`, else 0.

    Parameters
    ----------
    x, gate : Tensor [..., in], Tensor [..., rows]
        Of one token; `gate` is the activated gate a.
    weight : Tensor [rows, in]
        Output-major: a row that rests is not read.
    cutoff : float32 Tensor [rows]
    start : float32 Tensor [rows], optional
    launch : list of int
        A `Launch` with a split of 1.

    Returns
    -------
    Tensor [..., rows]
    """
    (outputs, inputs), at = weight.shape, Launch(*launch)
    y = torch.empty_like(gate)
    _gated_rows[(triton.cdiv(outputs, at.outputs),)](
        x,
        weight,
        gate,
        cutoff,
        cutoff if start is None else start,
        y,
        inputs,
        outputs,
        STARTED=start is not None,
        INPUTS=at.inputs,
        OUTPUTS=at.outputs,
        num_warps=at.warps,
    )
    return y


@gated_rows.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor, cutoff: Tensor, start: Tensor | None, launch: list[int]) -> Tensor:
    return torch.empty_like(gate)
