"""Decode kernels on GPUs, in Triton: matrix-vector products that read only the weights of active inputs.

Weights are kept input-major, [in, out]. A program takes a part of the inputs (split-K) and a tile of the outputs: it
writes down which of its inputs are active (those of its first may be asked for before, and are under way meanwhile),
then reads the weights of those alone, several rows at a time, so that what rests costs neither bytes nor waiting. Its
sums are in fp32, and the last program to finish a tile adds them up in their order, so that the result does not depend
on which that is. Where the device can, a launch begins while the one before it ends (programmatic dependent launch).
Registered with `torch.library`: the operators work under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton: launches wait for one another
    gdc_launch_dependents = gdc_wait = None

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
    ahead: int = 0
    """1: ask for the weights of a program's first inputs before it lists its other active ones."""


@cache
def chained(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends: NVIDIA's Hopper and later."""
    known = device.type == "cuda" and not torch.version.hip and gdc_wait is not None
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def options(device: torch.device) -> dict[str, Any]:
    """What a launch is told besides its arguments."""
    return {"launch_pdl": True} if chained(device) else {}


@triton.jit
def _active(x, shift, cutoff, k, limit, RESTING: tl.constexpr, SHIFTED: tl.constexpr):
    """Inputs `k`, else 0, and which of them to read the weights of."""
    v = tl.load(x + k, mask=k < limit, other=0.0).to(tl.float32)
    if SHIFTED:
        v = (v - tl.load(shift + k, mask=k < limit, other=0.0)).to(x.dtype.element_ty).to(tl.float32)
    rests = tl.abs(v) <= tl.load(cutoff + k, mask=k < limit, other=0.0)  # NaN does not rest
    chosen = (k < limit) & (rests if RESTING else rests == 0)
    return tl.where(chosen, v, 0.0), chosen


@triton.jit
def _listed(index, value, i, count):
    """Entries `i` of the list of active inputs."""
    return tl.load(index + i, mask=i < count, other=0), tl.load(value + i, mask=i < count, other=0.0)


@triton.jit
def _rows(w, stride, k, inside, n, outputs):
    """Weights ``w[k, n]`` of the inputs `inside`, else 0; they are read once, by nobody else."""
    at = w + k.to(tl.int64)[:, None] * stride + n[None, :]
    return tl.load(at, mask=inside[:, None] & (n < outputs)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _columns(
    x,
    w,
    cutoff,
    shift,
    start,
    z,
    u,
    ranks,
    index,
    value,
    partial,
    counter,
    y,
    inputs,
    outputs,
    stride,
    split,
    second,
    third,
    RESTING: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    RANKED: tl.constexpr,
    SHARED: tl.constexpr,
    CHAINED: tl.constexpr,
    AHEAD: tl.constexpr,
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
    lane = tl.arange(0, INPUTS)
    if CHAINED:  # in this order: what begins early may count on all that was launched before this
        gdc_wait()
        gdc_launch_dependents()
    unlisted = low
    if AHEAD:
        v, chosen = _active(x, shift + row, cutoff + row, low + lane, high, RESTING, SHIFTED)
        head = _rows(w, stride, low + lane, chosen, n, outputs)
        unlisted += INPUTS
    count = 0
    for first in range(unlisted, high, CHUNK):
        k = first + tl.arange(0, CHUNK)
        later, kept = _active(x, shift + row, cutoff + row, k, high, RESTING, SHIFTED)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(index + place, k, mask=kept)
        tl.store(value + place, later, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # the list is written before any thread reads it
    k1, v1 = _listed(index, value, lane, count)
    sums = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    if AHEAD:
        sums += v[:, None] * head.to(tl.float32)
    for first in range(0, count, INPUTS):
        found = _rows(w, stride, k1, first + lane < count, n, outputs)
        v = v1
        # The next entries are under way while the weights of these are awaited.
        k1, v1 = _listed(index, value, first + INPUTS + lane, count)
        sums += v[:, None] * found.to(tl.float32)
    if RANKED:
        begins, rank = tl.load(ranks + 2 * layer), tl.load(ranks + 2 * layer + 1)
        for first in range(part * INPUTS, rank, split * INPUTS):
            r = first + lane
            v = tl.load(z + begins + r, mask=r < rank, other=0.0)
            sums += v[:, None] * _rows(u, outputs, r, r < rank, n, outputs).to(tl.float32)
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
    CHAINED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
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
    ranks: Tensor | None,
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
    z, u : float32 Tensor [n], Tensor [rank, out], optional
        The low-rank parts, those of several layers side by side.
    ranks : int32 Tensor [layers, 2], optional
        Where in `z` the part of each layer begins, and its rank.
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
    with on(x.device):
        _columns[tiles, at.split](
            x,
            weight,
            cutoff,
            cutoff if shift is None else shift,
            cutoff if start is None else start,
            cutoff if z is None else z,
            weight if u is None else u,
            counter if ranks is None else ranks,
            index,
            value,
            partial,
            counter,
            y,
            inputs,
            outputs,
            weight.stride(0),
            at.split,
            *begins,
            RESTING=resting,
            SHIFTED=shift is not None,
            STARTED=start is not None,
            RANKED=u is not None,
            SHARED=at.split > 1,
            CHAINED=chained(x.device),
            AHEAD=at.ahead,
            INPUTS=at.inputs,
            OUTPUTS=at.outputs,
            num_warps=at.warps,
            **options(x.device),
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
    ranks: Tensor | None,
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
    with on(x.device):
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
            CHAINED=chained(x.device),
            INPUTS=at.inputs,
            OUTPUTS=at.outputs,
            num_warps=at.warps,
            **options(x.device),
        )
    return y


@gated_rows.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor, cutoff: Tensor, start: Tensor | None, launch: list[int]) -> Tensor:
    return torch.empty_like(gate)
