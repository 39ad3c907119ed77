"""Computes matrix-vector products of quantised weights in Triton: the form that runs on every GPU.

A program takes a tile of 128 bytes a row and a part of the inputs, and reads the codes and scales of the active ones
alone. An input's scale is multiplied into its activation once for a tile's group; codes become numbers by bit
operations, 16 (4 bits) or 256 (8 bits) too large each, which is taken off at the end. Sums are in fp32, and the last
program of a tile adds them up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_norm import activated, given, rate_of, taken
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

WORDS = 32


@triton.jit
def _numbers(words, p, BITS: tl.constexpr):
    """Makes numbers of the parts `p` of words: what they hold, plus 16 (4 bits) or 256 (8 bits)."""
    held = (words >> (p * BITS)) & ((1 << BITS) - 1)
    q = (held << (23 - BITS)) | (0x41800000 if BITS == 4 else 0x43800000)
    return q.to(tl.float32, bitcast=True)


@triton.jit
def _quantised_columns(
    x,
    codes,
    scales,
    cutoff,
    shift,
    start,
    squares,
    gain,
    residual,
    partial,
    counter,
    y,
    y_squares,
    inputs,
    outputs,
    tiles,
    step,
    split,
    second,
    third,
    second_tile,
    third_tile,
    count_squares,
    eps,
    scale,
    BITS: tl.constexpr,
    READS_ALL: tl.constexpr,
    SHIFTED: tl.constexpr,
    STARTED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    CHAINED: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUTS: tl.constexpr,
):
    PARTS: tl.constexpr = 32 // BITS
    TILE: tl.constexpr = PARTS * 32
    tile, part = tl.program_id(0), tl.program_id(1)
    layer = (tile >= second_tile).to(tl.int32) + (tile >= third_tile).to(tl.int32)
    begin, end = tile * TILE, second
    if layer == 1:
        begin, end = second + (tile - second_tile) * TILE, third
    if layer == 2:
        begin, end = third + (tile - third_tile) * TILE, outputs
    stored = x.dtype.element_ty
    low = part * step
    high = tl.minimum(low + step, inputs)
    c, p = tl.arange(0, 32), tl.arange(0, PARTS)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    rate = 1.0
    if NORMED > 0:
        rate = rate_of(squares, count_squares, inputs, eps, SQUARES)
    sums = tl.zeros((32, PARTS), tl.float32)
    total = tl.zeros((PARTS,), tl.float32)
    for first in range(low, high, INPUTS):
        k = first + tl.arange(0, INPUTS)
        inside = k < high
        v, opened = given(x, inputs, k, inside, GATED)
        weight = 1.0
        if NORMED > 0:
            weight = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        v = taken(v, opened, weight, rate, NORMED, GATED)
        kept = inside
        if not READS_ALL:
            if SHIFTED:
                v = (v - tl.load(shift + layer * inputs + k, mask=inside, other=0.0)).to(stored).to(tl.float32)
            least = tl.load(cutoff + layer * inputs + k, mask=inside, other=0.0)
            kept = inside & ((tl.abs(v) <= least) == 0)  # NaN does not rest
        v = tl.where(kept, v, 0.0)
        row = k.to(tl.int64) * tiles + tile
        words = tl.load(
            codes + row[:, None] * 32 + c[None, :], mask=kept[:, None], other=0, eviction_policy="evict_first"
        )
        by = tl.load(scales + row[:, None] * PARTS + p[None, :], mask=kept[:, None], other=0.0).to(tl.float32)
        by = by * v[:, None]
        sums += tl.sum(by[:, None, :] * _numbers(words[:, :, None], p[None, None, :], BITS), 0)
        total += tl.sum(by, 0)
    sums -= ((24.0 if BITS == 4 else 384.0) * total)[None, :]
    n = tile * TILE + p[None, :] * 32 + c[:, None]
    last = part == 0
    if split > 1:
        tl.store(partial + part * tiles * TILE + n, sums)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == split - 1
    if last:
        i = tl.arange(0, TILE)
        n1 = begin + i
        inside1 = n1 < end
        if split > 1:
            s = tl.arange(0, SPLIT)
            at = partial + s[:, None] * (tiles * TILE) + tile * TILE + i[None, :]
            there = (s < split)[:, None] & (i >= 0)[None, :]
            done = tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"), 0)
            tl.store(counter + tile, 0)
        else:
            done = tl.reshape(tl.trans(sums), (TILE,))
        if STARTED:
            done += tl.load(start + n1, mask=inside1, other=0.0)
        if ADDED:  # rounded where a model rounds: the product, then the sum
            before = tl.load(residual + n1, mask=inside1, other=0.0).to(tl.float32)
            done = (done.to(stored).to(tl.float32) * scale).to(stored).to(tl.float32)
            done = tl.where(inside1, (done + before).to(stored).to(tl.float32), 0.0)
            tl.store(y_squares + tile, tl.sum(done * done, 0))
        tl.store(y + n1, done.to(y.dtype.element_ty), mask=inside1)


def quantised_columns(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    outputs: int,
    cutoff: Tensor,
    shift: Tensor | None,
    start: Tensor | None,
    begins: tuple[int, int],
    first_tiles: tuple[int, int],
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    gated: int,
    residual: Tensor | None,
    scale: float,
    counter: Tensor,
    reads_all: bool,
    launch: tuple[int, int, int],
    y: Tensor,
    y_squares: Tensor,
) -> None:
    """Computes the masked product of one token with packed codes into `y`; arguments are those of `columns`.

    Parameters
    ----------
    codes, scales, bits : int32 Tensor [inputs, tiles * 32], Tensor [inputs, tiles * 32 / bits], int
        Of `cuda_quantised_layout.in_planes`, those of several layers side by side.
    begins, first_tiles : (int, int)
        First outputs and first tiles of the second and the third layer; the number of outputs, and a tile that is not
        there, where there is none.
    launch : (int, int, int)
        Inputs of a step, warps, and programs that share a tile.
    y, y_squares : Tensor [..., outputs], float32 Tensor [tiles]
        The result, stored or in float32, and with a residual the sums of its squares.
    """
    inputs, tiles = codes.shape[0], codes.shape[1] // WORDS
    block, warps, split = launch
    partial = torch.empty(split * tiles * WORDS * 32 // bits if split > 1 else 1, device=x.device)
    with cuda_overlap.on(x.device):
        _quantised_columns[tiles, split](
            x,
            codes,
            scales,
            cutoff,
            cutoff if shift is None else shift,
            cutoff if start is None else start,
            cutoff if squares is None else squares,
            x if gain is None else gain,
            x if residual is None else residual,
            partial,
            counter,
            y,
            y_squares,
            inputs,
            outputs,
            tiles,
            triton.cdiv(triton.cdiv(inputs, split), block) * block,
            split,
            *begins,
            *first_tiles,
            0 if squares is None else squares.numel(),
            eps,
            scale,
            BITS=bits,
            READS_ALL=reads_all,
            SHIFTED=shift is not None,
            STARTED=start is not None,
            NORMED=0 if squares is None else 1 if rounds_first else 2,
            GATED=gated,
            ADDED=residual is not None,
            CHAINED=cuda_overlap.chained(x.device),
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.numel()),
            SPLIT=triton.next_power_of_2(split),
            INPUTS=block,
            num_warps=warps,
            **cuda_overlap.options(x.device),
        )


@triton.jit
def _quantised_rows(
    x,
    codes,
    scales,
    gate,
    cutoff,
    start,
    squares,
    gain,
    y,
    inputs,
    outputs,
    words,
    group,
    count_squares,
    eps,
    BITS: tl.constexpr,
    STARTED: tl.constexpr,
    NORMED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    CHAINED: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    PARTS: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    stored = y.dtype.element_ty
    least = tl.load(cutoff + n, mask=inside, other=0.0)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    a = tl.load(gate + n, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATED > 0:
        a = activated(a, ACTIVATED).to(stored).to(tl.float32)
    rate = 1.0
    if NORMED > 0:
        rate = rate_of(squares, count_squares, inputs, eps, SQUARES)
    kept = inside & ((tl.abs(a) <= least) == 0)
    c, p = tl.arange(0, BLOCKS * 32), tl.arange(0, PARTS)
    scales += (tl.program_id(0) * OUTPUTS // group).to(tl.int64) * inputs
    sums = tl.zeros((OUTPUTS, BLOCKS * 32), tl.float32)
    for first in range(0, words, BLOCKS * 32):
        w = first + c
        at = codes + n.to(tl.int64)[:, None] * words + w[None, :]
        tile = tl.load(at, mask=kept[:, None] & (w < words)[None, :], other=0)
        k = (w // 32 * (32 * PARTS) + w % 32)[:, None] + p[None, :] * 32
        there = (k < inputs) & (w < words)[:, None]
        weight = 1.0
        if NORMED > 0:
            weight = tl.load(gain + k, mask=there, other=0.0).to(tl.float32)
        v, opened = given(x, inputs, k, there, 0)
        v = taken(v, opened, weight, rate, NORMED, 0) * tl.load(scales + k, mask=there, other=0.0).to(tl.float32)
        q = _numbers(tile[:, :, None], p[None, None, :], BITS) - (24.0 if BITS == 4 else 384.0)
        sums += tl.sum(q * v[None, :, :], 2)
    up = tl.sum(sums, 1)
    if STARTED:
        up += tl.load(start + n, mask=inside, other=0.0)
    product = a * up.to(stored).to(tl.float32)  # rounded where the masked form rounds
    tl.store(y + n, tl.where(kept, product, 0.0).to(stored), mask=inside)


def quantised_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    gate: Tensor,
    cutoff: Tensor,
    start: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    activation: int,
    launch: tuple[int, int, int],
    y: Tensor,
) -> None:
    """Computes the rows of ``up`` whose activated gate does not rest into `y`; arguments are those of `gated_rows`.

    Parameters
    ----------
    codes, scales, bits, group : int32 Tensor [outputs, words], Tensor [groups, inputs], int, int
        Of `cuda_quantised_layout.by_outputs`.
    launch : (int, int, int)
        Blocks of 32 words of a step, outputs of a program (they divide a group), and warps.
    """
    outputs, words = codes.shape
    blocks, rows, warps = launch
    with cuda_overlap.on(x.device):
        _quantised_rows[(triton.cdiv(outputs, rows),)](
            x,
            codes,
            scales,
            gate,
            cutoff,
            cutoff if start is None else start,
            cutoff if squares is None else squares,
            x if gain is None else gain,
            y,
            x.numel(),
            outputs,
            words,
            group,
            0 if squares is None else squares.numel(),
            eps,
            BITS=bits,
            STARTED=start is not None,
            NORMED=0 if squares is None else 1 if rounds_first else 2,
            ACTIVATED=activation,
            CHAINED=cuda_overlap.chained(x.device),
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.numel()),
            BLOCKS=blocks,
            OUTPUTS=rows,
            num_warps=warps,
            **cuda_overlap.options(x.device),
        )
