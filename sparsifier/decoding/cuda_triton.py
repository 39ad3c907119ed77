"""Computes matrix-vector products on GPUs, in Triton, that read only the weights of active inputs.

Weights are kept input-major, [in, out]. A program takes a part of the inputs (split-K) and a tile of the outputs: it
writes down which of its inputs are active, then reads the weights of those alone, several rows at a time, so that what
rests costs neither bytes nor waiting. Its sums are in fp32, and the last program to finish a tile adds them up in their
order, so that the result does not depend on which that is. What comes before a product in a block (RMSNorm, the
activated gate) and after it (the residual stream) can be done in its launch. Registered with `torch.library`: the
operator works under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_norm import given, rate_of, taken
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

CHUNKS = (256, 512, 1024)
"""Inputs that are looked at together: no more than a program's part needs."""
BYTES = 16
"""Bytes that a thread reads at once: so many threads share a row, and the others have rows of their own."""
SPLITS = (8, 16, 32)
"""Partial sums that are added up together: no more than a product needs."""


class Launch(NamedTuple):
    """Says how a product is laid out on a device: a program reads `inputs` x `outputs` weights at a time."""

    inputs: int
    outputs: int
    warps: int
    split: int
    """Programs that share one tile of outputs, each with a part of the inputs; 1 to 32."""


@triton.jit
def _fixed(cutoff, shift, gain, k, inside, SHIFTED: tl.constexpr, NORMED: tl.constexpr):
    """Loads cutoff, shift and norm weight of the inputs `k`: the layer's own, so that no launch is waited for."""
    least = tl.load(cutoff + k, mask=inside, other=0.0)
    moved, weight = least, least
    if SHIFTED:
        moved = tl.load(shift + k, mask=inside, other=0.0)
    if NORMED > 0:
        weight = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    return least, moved, weight


@triton.jit
def _active(v, least, moved, inside, stored, RESTING: tl.constexpr, SHIFTED: tl.constexpr):
    """Gives the values `v` of the inputs `inside`, else 0, and which of them to read the weights of."""
    if SHIFTED:
        v = (v - moved).to(stored).to(tl.float32)
    rests = tl.abs(v) <= least  # NaN does not rest
    chosen = inside & (rests if RESTING else rests == 0)
    return tl.where(chosen, v, 0.0), chosen


@triton.jit
def _listed(index, value, i, count):
    """Loads the entries `i` of the list of active inputs."""
    return tl.load(index + i, mask=i < count, other=0), tl.load(value + i, mask=i < count, other=0.0)


@triton.jit
def _rows(w, stride, k, inside, n, outputs):
    """Loads the weights ``w[k, n]`` of the inputs `inside`, else 0; they are read once, by nobody else."""
    at = w + k.to(tl.int64)[:, :, None] * stride + n[None, None, :]
    return tl.load(at, mask=inside[:, :, None] & (n < outputs)[None, None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(v, rows):
    """Sums `rows` times `v` to [groups, outputs]: over the second axis, which is a thread's own."""
    return tl.sum(v[:, :, None] * rows.to(tl.float32), 1)


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
    squares,
    gain,
    residual,
    index,
    value,
    partial,
    counter,
    y,
    y_squares,
    inputs,
    outputs,
    stride,
    split,
    second,
    third,
    count_squares,
    eps,
    scale,
    READS_ALL: tl.constexpr,
    RESTING: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    RANKED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    SHARED: tl.constexpr,
    KEEP_PARTIAL_SUMS: tl.constexpr,
    CHAINED: tl.constexpr,
    SQUARES: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    stored = x.dtype.element_ty
    layer = (tile * OUTPUTS >= second).to(tl.int32) + (tile * OUTPUTS >= third).to(tl.int32)
    cutoff += layer * inputs
    shift += layer * inputs
    step = tl.cdiv(inputs, split)
    low = part * step
    high = tl.minimum(low + step, inputs)
    index += (tile * split + part).to(tl.int64) * step
    value += (tile * split + part).to(tl.int64) * step
    lane = tl.arange(0, GROUPS)[:, None] * (INPUTS // GROUPS) + tl.arange(0, INPUTS // GROUPS)[None, :]
    many = lane if READS_ALL else tl.arange(0, CHUNK)
    k = low + many
    least, moved, weight = _fixed(cutoff, shift, gain, k, k < high, SHIFTED, NORMED)
    if CHAINED and not RANKED:  # in this order: what begins early may count on all that was launched before this
        gdc_wait()
        gdc_launch_dependents()
    v, opened = given(x, inputs, k, k < high, GATED)
    if READS_ALL:
        found = _rows(w, stride, k, k < high, n, outputs)
    rate = 1.0
    if NORMED > 0:  # what is asked for above is under way
        rate = rate_of(squares, count_squares, inputs, eps, SQUARES)
    sums = tl.zeros((GROUPS, OUTPUTS), tl.float32)
    if READS_ALL:
        for first in range(low, high, INPUTS):
            now, v0 = found, taken(v, opened, weight, rate, NORMED, GATED)
            k = first + INPUTS + many
            found = _rows(w, stride, k, k < high, n, outputs)
            least, moved, weight = _fixed(cutoff, shift, gain, k, k < high, SHIFTED, NORMED)
            v, opened = given(x, inputs, k, k < high, GATED)
            sums += _product(v0, now)
    else:
        count = 0
        for first in range(low, high, CHUNK):
            k = first + many
            v0 = taken(v, opened, weight, rate, NORMED, GATED)
            v0, kept = _active(v0, least, moved, k < high, stored, RESTING, SHIFTED)
            place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(index + place, k, mask=kept)
            tl.store(value + place, v0, mask=kept)
            count += tl.sum(kept.to(tl.int32), 0)
            k += CHUNK
            least, moved, weight = _fixed(cutoff, shift, gain, k, k < high, SHIFTED, NORMED)
            v, opened = given(x, inputs, k, k < high, GATED)
        tl.debug_barrier()  # the list is written before any thread reads it
        k1, v1 = _listed(index, value, lane, count)
        for first in range(0, count, INPUTS):
            found = _rows(w, stride, k1, first + lane < count, n, outputs)
            v0 = v1
            # The next entries are under way while the weights of these are awaited.
            k1, v1 = _listed(index, value, first + INPUTS + lane, count)
            sums += _product(v0, found)
    if RANKED:
        if CHAINED:  # what made `z` was launched last, after all else that is read here: the two run side by side
            gdc_wait()
            gdc_launch_dependents()
        begins, rank = tl.load(ranks + 2 * layer), tl.load(ranks + 2 * layer + 1)
        for first in range(part * INPUTS, rank, split * INPUTS):
            r = first + lane
            v0 = tl.load(z + begins + r, mask=r < rank, other=0.0)
            sums += _product(v0, _rows(u, outputs, r, r < rank, n, outputs))
    total = tl.sum(sums, 0)
    if KEEP_PARTIAL_SUMS:
        if STARTED and part == 0:
            total += tl.load(start + n, mask=inside, other=0.0)
        tl.store(y + part * outputs + n, total, mask=inside)
        return
    if STARTED:  # on its way while programs are counted
        begin = tl.load(start + n, mask=inside, other=0.0)
    if ADDED:
        before = tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    last = part == 0
    if SHARED:
        tl.store(partial + part * outputs + n, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == split - 1
    if last:
        if SHARED:
            p = tl.arange(0, SPLIT)
            at = partial + p[:, None] * outputs + n[None, :]
            total = tl.sum(tl.load(at, mask=(p < split)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg"), 0)
            tl.store(counter + tile, 0)
        if STARTED:
            total += begin
        if ADDED:  # rounded where a model rounds: the product, then the sum
            total = (total.to(stored).to(tl.float32) * scale).to(stored).to(tl.float32)
            total = (total + before).to(stored).to(tl.float32)
            tl.store(y_squares + tile, tl.sum(total * total, 0))
        tl.store(y + n, total.to(y.dtype.element_ty), mask=inside)


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
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    gated: int,
    residual: Tensor | None,
    scale: float,
    counter: Tensor,
    reads_all: bool,
    resting: bool,
    launch: list[int],
    wide: bool,
    keep_partial_sums: bool,
) -> tuple[Tensor, Tensor]:
    r"""Computes the masked product of one token, :math:`y = start + W (x - shift)_{kept} + U z`.

    Parameters
    ----------
    x : Tensor [..., in]
        Of one token; [..., 2 in] if `gated`.
    weight : Tensor [in, out]
        Every row one run; a part of wider rows is fine.
    cutoff, shift : float32 Tensor [layers, in]
        `Rule.cutoff` and `Rule.shift` of every layer whose outputs are side by side in `weight`, at most three. These
        and `gain` are read before earlier launches are waited for: nothing that is under way may write them.
    start : float32 Tensor [out], optional
        What the sums start from: a bias costs its own bytes, and no launch.
    begins : list of int
        First outputs of the second and of the third layer, multiples of a tile's outputs; `out` where there is none.
    z, u : float32 Tensor [n], Tensor [rank, out], optional
        The low-rank parts, those of several layers side by side. `z` is waited for last: what made it is the launch
        before this, and nothing else that is read here is.
    ranks : int32 Tensor [layers, 2], optional
        Where in `z` the part of each layer begins, and its rank.
    squares, gain, eps, rounds_first : float32 Tensor [n], Tensor [in], float, bool
        The input is `x` after RMSNorm with the weights `gain`, rounded before these or not; `squares` add up to the
        sum of squares of `x`.
    gated : int
        The input is this activation of the first half of `x` (`cuda_norm.ACTIVATIONS`, from 1), times the second half.
    residual, scale : Tensor [out], float, optional
        What the product, times `scale`, is added to; the result is the sum.
    counter : int32 Tensor [tiles]
        Zeros, and zeros again afterwards.
    reads_all : bool
        Read all weights, whatever the cutoffs, without a list of what to read.
    resting : bool
        Read the weights of the resting inputs instead.
    launch : list of int
        A `Launch`.
    wide : bool
        Result in float32, not in the dtype of `x`.
    keep_partial_sums : bool
        Leave the sums of the programs that share a tile to who reads them: no program waits for another.

    Returns
    -------
    Tensor [..., out], or float32 Tensor [split, out] if `keep_partial_sums`
    float32 Tensor [tiles]
        With a residual: sums of squares of the result, one number per tile. Else [0].
    """
    (inputs, outputs), at = weight.shape, Launch(*launch)
    tiles, step = triton.cdiv(outputs, at.outputs), triton.cdiv(inputs, at.split)
    shared = at.split > 1 and not keep_partial_sums
    listed, sums = 0 if reads_all else tiles * at.split * step, at.split * outputs if shared else 0
    y, y_squares, room = _results(x, outputs, at, wide, keep_partial_sums, residual, 2 * listed + sums)
    index, value, partial = room.split([listed, listed, sums])
    index = index.view(torch.int32)
    with cuda_overlap.on(x.device):
        _columns[tiles, at.split](
            x,
            weight,
            cutoff,
            cutoff if shift is None else shift,
            cutoff if start is None else start,
            cutoff if z is None else z,
            weight if u is None else u,
            counter if ranks is None else ranks,
            cutoff if squares is None else squares,
            x if gain is None else gain,
            x if residual is None else residual,
            index,
            value,
            partial,
            counter,
            y,
            y_squares,
            inputs,
            outputs,
            weight.stride(0),
            at.split,
            *begins,
            0 if squares is None else squares.numel(),
            eps,
            scale,
            READS_ALL=reads_all,
            RESTING=resting,
            SHIFTED=shift is not None,
            STARTED=start is not None,
            RANKED=u is not None,
            NORMED=0 if squares is None else 1 if rounds_first else 2,
            GATED=gated,
            ADDED=residual is not None,
            SHARED=shared,
            KEEP_PARTIAL_SUMS=keep_partial_sums,
            CHAINED=cuda_overlap.chained(x.device),
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.numel()),
            SPLIT=_of(SPLITS, at.split),
            CHUNK=_of(CHUNKS, step),
            INPUTS=at.inputs,
            GROUPS=max(1, min(at.inputs, BYTES // x.element_size() * 32 * at.warps // at.outputs)),
            OUTPUTS=at.outputs,
            num_warps=at.warps,
            **cuda_overlap.options(x.device),
        )
    return y, y_squares


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
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    gated: int,
    residual: Tensor | None,
    scale: float,
    counter: Tensor,
    reads_all: bool,
    resting: bool,
    launch: list[int],
    wide: bool,
    keep_partial_sums: bool,
) -> tuple[Tensor, Tensor]:
    return _results(x, weight.shape[1], Launch(*launch), wide, keep_partial_sums, residual)[:2]


def _results(
    x: Tensor, outputs: int, launch: Launch, wide: bool, keep_partial_sums: bool, residual: Tensor | None, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates what is returned, and room for so many float32 numbers besides.

    With a float32 result it is one piece of memory: who reads that may begin before this is done, and holds it.
    """
    shape = (launch.split, outputs) if keep_partial_sums else (*x.shape[:-1], outputs)
    own = prod(shape) if wide or keep_partial_sums else 0
    result, rest = x.new_empty(own + room, dtype=torch.float32).split([own, room])
    tiles = 0 if residual is None else triton.cdiv(outputs, launch.outputs)
    y_squares = x.new_empty(tiles, dtype=torch.float32)
    return result.view(shape) if own else x.new_empty(shape), y_squares, rest


def _of(sizes: tuple[int, ...], needed: int) -> int:
    return next((size for size in sizes if size >= needed), sizes[-1])
