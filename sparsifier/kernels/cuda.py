"""Decode kernels on GPUs, in Triton: matrix-vector products that read only the weights of active inputs.

Weights are kept input-major, [in, out]. A program takes a part of the inputs (split-K) and a tile of the outputs: it
writes down which of its inputs are active, then reads the weights of those alone, several rows at a time, so that what
rests costs neither bytes nor waiting. Its sums are in fp32, and the last program to finish a tile adds them up in their
order, so that the result does not depend on which that is. Registered with `torch.library`: the operators work under
torch.compile and in CUDA graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(512)
"""Inputs that are looked at together."""
MOST = tl.constexpr(32)
"""Largest split."""


class Launch(NamedTuple):
    """How a product is laid out on a device: a program reads `inputs` x `outputs` weights at a time."""

    inputs: int
    outputs: int
    warps: int
    split: int
    """Programs that share one tile of outputs, each with a part of the inputs; 1 to 32."""


@triton.jit
def _active(x, shift, cutoff, k, limit, RESTING: tl.constexpr, SHIFTED: tl.constexpr):
    """Inputs `k`, and which of them to read the weights of."""
    v = tl.load(x + k, mask=k < limit, other=0.0).to(tl.float32)
    if SHIFTED:
        v = (v - tl.load(shift + k, mask=k < limit, other=0.0)).to(x.dtype.element_ty).to(tl.float32)
    rests = tl.abs(v) <= tl.load(cutoff + k, mask=k < limit, other=0.0)  # NaN does not rest
    return v, (k < limit) & (rests if RESTING else rests == 0)


@triton.jit
def _listed(index, value, i, count):
    """Entries `i` of the list of active inputs."""
    return tl.load(index + i, mask=i < count, other=0), tl.load(value + i, mask=i < count, other=0.0)


@triton.jit
def _add_rows(sums, v, inside, w, stride, k, n, outputs):
    """Add ``v[k] w[k, n]`` of the inputs `inside` to `sums` [k, n]; their weights are read once, by nobody else."""
    at = w + k.to(tl.int64)[:, None] * stride + n[None, :]
    mask = inside[:, None] & (n < outputs)[None, :]
    tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    return sums + v[:, None] * tile.to(tl.float32)


@triton.jit
def _columns(
    x,
    w,
    cutoff,
    shift,
    start,
    z,
    u,
    index,
    value,
    partial,
    counter,
    y,
    inputs,
    outputs,
    stride,
    rank,
    split,
    second,
    third,
    RESTING: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    RANKED: tl.constexpr,
    SHARED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    layer = (tile * OUTPUTS >= second).to(tl.int32) + (tile * OUTPUTS >= third).to(tl.int32)
    row = layer * inputs
    step = tl.cdiv(inputs, split)
    low = part * step
    high = tl.minimum(low + step, inputs)
    index += (tile * split + part).to(tl.int64) * step
    value += (tile * split + part).to(tl.int64) * step
    count = 0
    for first in range(low, high, CHUNK):
        k = first + tl.arange(0, CHUNK)
        v, kept = _active(x, shift + row, cutoff + row, k, high, RESTING, SHIFTED)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(index + place, k, mask=kept)
        tl.store(value + place, v, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # the list is written before any thread reads it
    lane = tl.arange(0, INPUTS)
    sums = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    k, v = _listed(index, value, lane, count)
    for first in range(0, count, INPUTS):
        # The next entries are under way while the weights of these are awaited.
        k1, v1 = _listed(index, value, first + INPUTS + lane, count)
        sums = _add_rows(sums, v, first + lane < count, w, stride, k, n, outputs)
        k, v = k1, v1
    if RANKED:
        for first in range(part * INPUTS, rank, split * INPUTS):
            r = first + lane
            v = tl.load(z + r, mask=r < rank, other=0.0)
            sums = _add_rows(sums, v, r < rank, u, outputs, r, n, outputs)
    total = tl.sum(sums, 0)
    inside = n < outputs
    last = part == 0
    if SHARED:
        tl.store(partial + part * outputs + n, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == split - 1
    if last:
        if SHARED:
            p = tl.arange(0, MOST)
            at = partial + p[:, None] * outputs + n[None, :]
            total = tl.sum(tl.load(at, mask=(p < split)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg"), 0)
            tl.store(counter + tile, 0)
        if STARTED:
            total += tl.load(start + n, mask=inside, other=0.0)
        tl.store(y + n, total.to(y.dtype.element_ty), mask=inside)


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
    begins: list[int],
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
    cutoff, shift : float32 Tensor [layers, in]
        `Rule.cutoff` and `Rule.shift` of every layer whose outputs are side by side in `weight`, at most three.
    start : float32 Tensor [out], optional
        What the sums start from: a bias costs its own bytes, and no launch.
    begins : list of int
        First outputs of the second and of the third layer, multiples of a tile's outputs; `out` where there is none.
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
    tiles, step = triton.cdiv(outputs, at.outputs), triton.cdiv(inputs, at.split)
    index = torch.empty(tiles * at.split * step, dtype=torch.int32, device=x.device)
    value = torch.empty_like(index, dtype=torch.float32)
    partial = torch.empty(at.split, outputs, dtype=torch.float32, device=x.device) if at.split > 1 else value
    _columns[tiles, at.split](
        x,
        weight,
        cutoff,
        cutoff if shift is None else shift,
        cutoff if start is None else start,
        cutoff if z is None else z,
        weight if u is None else u,
        index,
        value,
        partial,
        counter,
        y,
        inputs,
        outputs,
        weight.stride(0),
        0 if u is None else u.shape[0],
        at.split,
        *begins,
        RESTING=resting,
        SHIFTED=shift is not None,
        STARTED=start is not None,
        RANKED=u is not None,
        SHARED=at.split > 1,
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
    begins: list[int],
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
