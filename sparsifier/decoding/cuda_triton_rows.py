"""Computes the rows of ``up`` under a mask of the activated gate, in Triton: a row that rests is not read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda_norm import activated, given, rate_of, taken
from resting.sparsifier.decoding.cuda_overlap import gdc_launch_dependents, gdc_wait
from resting.sparsifier.decoding.cuda_triton import Launch


@triton.jit
def _gated_rows(
    x,
    w,
    gate,
    cutoff,
    start,
    squares,
    gain,
    y,
    inputs,
    outputs,
    count_squares,
    eps,
    STARTED: tl.constexpr,
    NORMED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    CHAINED: tl.constexpr,
    SQUARES: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    stored = y.dtype.element_ty
    least = tl.load(cutoff + n, mask=inside, other=0.0)  # of the layer, not of a launch: needs no waiting
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
    sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        k = first + tl.arange(0, INPUTS)
        at = w + n.to(tl.int64)[:, None] * inputs + k[None, :]
        tile = tl.load(at, mask=kept[:, None] & (k < inputs)[None, :], other=0.0)
        weight = 1.0
        if NORMED > 0:
            weight = tl.load(gain + k, mask=k < inputs, other=0.0).to(tl.float32)
        v, opened = given(x, inputs, k, k < inputs, 0)
        v = taken(v, opened, weight, rate, NORMED, 0)
        sums += v[None, :] * tile.to(tl.float32)
    up = tl.sum(sums, 1)
    if STARTED:
        up += tl.load(start + n, mask=inside, other=0.0)
    product = a * up.to(stored).to(tl.float32)  # rounded where the masked form rounds
    tl.store(y + n, tl.where(kept, product, 0.0).to(stored), mask=inside)


@torch.library.custom_op("resting::gated_rows", mutates_args=())
def gated_rows(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    cutoff: Tensor,
    start: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    rounds_first: bool,
    activation: int,
    launch: list[int],
) -> Tensor:
    r"""Computes the rows of ``up`` under a mask of the activated gate.

    They are :math:`y = a \odot (W x + start)` where :math:`|a| > cutoff`, else 0.

    Parameters
    ----------
    x, gate : Tensor [..., in], Tensor [..., rows]
        Of one token; `gate` is the activated gate a, or what becomes it after `activation`.
    weight : Tensor [rows, in]
        Output-major: a row that rests is not read.
    cutoff : float32 Tensor [rows]
    start : float32 Tensor [rows], optional
    squares, gain, eps, rounds_first : float32 Tensor [n], Tensor [in], float, bool
        As of `columns`.
    activation : int
        One of `cuda_norm.ACTIVATIONS`, from 1; 0 for none.
    launch : list of int
        A `Launch` with a split of 1.

    Returns
    -------
    Tensor [..., rows]
    """
    (outputs, inputs), at = weight.shape, Launch(*launch)
    y = torch.empty_like(gate)
    with cuda_overlap.on(x.device):
        _gated_rows[(triton.cdiv(outputs, at.outputs),)](
            x,
            weight,
            gate,
            cutoff,
            cutoff if start is None else start,
            cutoff if squares is None else squares,
            x if gain is None else gain,
            y,
            inputs,
            outputs,
            0 if squares is None else squares.numel(),
            eps,
            STARTED=start is not None,
            NORMED=0 if squares is None else 1 if rounds_first else 2,
            ACTIVATED=activation,
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.numel()),
            CHAINED=cuda_overlap.chained(x.device),
            INPUTS=at.inputs,
            OUTPUTS=at.outputs,
            num_warps=at.warps,
            **cuda_overlap.options(x.device),
        )
    return y


@gated_rows.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor, *more: object) -> Tensor:
    return torch.empty_like(gate)
