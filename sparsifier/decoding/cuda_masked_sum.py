"""Adds up what the small programs of `cuda_masked` found, in one launch after theirs, always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait

WIDTH = 32
"""Outputs of a program: 128 bytes of every partial sum, and as many programs as a GPU has multiprocessors."""
ROWS = 64
"""Partial sums that a program reads at a time."""
WARPS = 4


@triton.jit
def _sum(
    sums,
    start,
    residual,
    y,
    y_squares,
    outputs,
    parts,
    tokens,
    scale,
    STARTED: tl.constexpr,
    ADDED: tl.constexpr,
    ATOMIC: tl.constexpr,
    CHAINED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tile, token = tl.program_id(0), tl.program_id(1)
    n = tile * WIDTH + tl.arange(0, WIDTH)
    inside = n < outputs
    stored = residual.dtype.element_ty
    if STARTED:
        begin = tl.load(start + n, mask=inside, other=0.0)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if ADDED:
        before = tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    if ATOMIC:
        at = sums + token * outputs + n
        total = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(at, tl.zeros((WIDTH,), tl.float32), mask=inside)  # as found
    else:
        found = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, parts, ROWS):
            p = first + tl.arange(0, ROWS)
            at = sums + (p[:, None] * tokens + token) * outputs + n[None, :]
            found += tl.load(at, mask=(p < parts)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        total = tl.sum(found, 0)
    if STARTED:
        total += begin
    if ADDED:  # rounded where a model rounds: the product, then the sum
        total = (total.to(stored).to(tl.float32) * scale).to(stored).to(tl.float32)
        total = (total + before).to(stored).to(tl.float32)
        tl.store(y_squares + tile, tl.sum(tl.where(inside, total * total, 0.0), 0))
    tl.store(y + token * outputs + n, total.to(y.dtype.element_ty), mask=inside)


def finished(
    x: Tensor,
    sums: Tensor,
    start: Tensor | None,
    residual: Tensor | None,
    scale: float,
    tokens: int,
    wide: bool,
    atomic: bool,
) -> tuple[Tensor, Tensor]:
    """Adds the partial sums of a product up, and what its result is added to.

    Parameters
    ----------
    x : Tensor [..., in]
        The input of the product, of `tokens` tokens.
    sums : float32 Tensor [parts, tokens, out], or [tokens, out] if `atomic`
        The latter are zeros afterwards.
    start : float32 Tensor [out], optional
    residual, scale : Tensor [out], float, optional
        What the product of one token, times `scale`, is added to.
    wide : bool
        Result as one partial sum, float32 [1, out].

    Returns
    -------
    Tensor [..., out], or float32 Tensor [1, out] if `wide`
    float32 Tensor [n]
        With a residual: sums of squares of the result. Else [0].
    """
    outputs = sums.shape[-1]
    parts = 1 if atomic else sums.shape[0]
    y, y_squares = results(x, outputs, wide, residual)
    with cuda_overlap.on(x.device):
        _sum[triton.cdiv(outputs, WIDTH), tokens](
            sums,
            sums if start is None else start,
            x if residual is None else residual,
            y,
            y_squares,
            outputs,
            parts,
            tokens,
            scale,
            STARTED=start is not None,
            ADDED=residual is not None,
            ATOMIC=atomic,
            CHAINED=cuda_overlap.chained(x.device),
            ROWS=min(ROWS, triton.next_power_of_2(parts)),
            WIDTH=WIDTH,
            num_warps=WARPS,
            **cuda_overlap.options(x.device),
        )
    return y, y_squares


def results(x: Tensor, outputs: int, wide: bool, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Allocates what `finished` gives."""
    y = x.new_empty(1, outputs, dtype=torch.float32) if wide else x.new_empty(*x.shape[:-1], outputs)
    return y, x.new_empty(0 if residual is None else triton.cdiv(outputs, WIDTH), dtype=torch.float32)
