"""Computes in one pass on a GPU what `masking` defines by a cutoff, with the dense tokens left and the kept counted.

A masked forward is then slower than a dense one by one reading and one writing of every input, and a meter costs
nothing. What is kept is that of plain torch, bit for bit: comparisons and counts have no rounding.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from resting.sparsifier.masking import kept_input
from resting.sparsifier.rule import Vector

ENTRIES = 4096
"""Entries of the input that a program has in registers at a time."""


@triton.jit
def _mask(
    x, out, counts, cutoff, shift, number, tokens, width, length, dense,
    BY_CHANNEL: tl.constexpr, SHIFTED: tl.constexpr, KEPT: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_there = row < tokens
    is_sparse = (row % length) >= dense
    found = tl.zeros([ROWS], tl.int32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = is_there[:, None] & (k < width)[None, :]
        at = row[:, None] * width + k[None, :]
        v = tl.load(x + at, mask=inside, other=0.0)
        moved = v
        if SHIFTED:
            by = tl.load(shift + k, mask=k < width, other=0.0).to(tl.float32)
            moved = (v.to(tl.float32) - by[None, :]).to(v.dtype)
        size = tl.abs(moved.to(tl.float32))
        if BY_CHANNEL:
            rests = size <= tl.load(cutoff + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        else:
            rests = size <= number
        kept = tl.where(rests, tl.zeros([ROWS, BLOCK], v.dtype), moved)  # NaN does not rest
        kept = tl.where(is_sparse[:, None], kept, v)
        if KEPT:
            tl.store(out + at, kept, mask=inside)
        if COUNTED:
            found += tl.sum((kept.to(tl.float32) != 0.0).to(tl.int32), 1)
    if COUNTED:
        tl.store(counts + row, found, mask=is_there)


def kept_and_counted(
    x: Tensor, cutoff: Vector, shift: Vector, length: int, dense: int, counted: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Computes the kept input of sequences whose first tokens are dense, and its entries that are not zero.

    Parameters
    ----------
    x : Tensor [..., in]
        Contiguous; tokens of a sequence follow one another.
    cutoff : float or Tensor [in]
        As `masking.kept_input`.
    shift : 0.0 or Tensor [in]
    length : int
        Tokens of a sequence.
    dense : int
        Tokens at the beginning of every sequence that pass as they are.
    counted : bool

    Returns
    -------
    kept : Tensor
        As `x`.
    counts : Tensor [tokens] of int32, or None
        Of every token, dense ones as well.
    """
    kept = torch.empty_like(x)
    counts = torch.empty(x.numel() // x.shape[-1], dtype=torch.int32, device=x.device) if counted else None
    _launch(x, kept, counts, cutoff, shift, length, dense)
    return kept, counts


def nonzero_counts(x: Tensor) -> Tensor:
    """Counts the entries of every token of `x` [..., in] that are not zero: [tokens] of int32."""
    counts = torch.empty(x.numel() // x.shape[-1], dtype=torch.int32, device=x.device)
    _launch(x, None, counts, cutoff=0.0, shift=0.0, length=1, dense=1)  # every token passes as it is
    return counts


def _launch(
    x: Tensor, kept: Tensor | None, counts: Tensor | None, cutoff: Vector, shift: Vector, length: int, dense: int
) -> None:
    width = x.shape[-1]
    tokens = x.numel() // width
    block = min(ENTRIES, triton.next_power_of_2(width))
    rows = ENTRIES // block
    with torch.cuda.device_of(x):
        _mask[(triton.cdiv(tokens, rows),)](
            x, x if kept is None else kept, x if counts is None else counts,
            cutoff if isinstance(cutoff, Tensor) else x, shift if isinstance(shift, Tensor) else x,
            0.0 if isinstance(cutoff, Tensor) else cutoff, tokens, width, length, dense,
            BY_CHANNEL=isinstance(cutoff, Tensor), SHIFTED=isinstance(shift, Tensor), KEPT=kept is not None,
            COUNTED=counts is not None, ROWS=rows, BLOCK=block,
        )  # fmt: skip


@cache
def works(device: torch.device) -> bool:
    """Tells whether the kernel can be compiled and run on `device`, and gives there what plain torch does.

    A machine may have Triton without a compiler for it.
    """
    x = torch.linspace(-2, 2, 3 * 48, device=device).reshape(3, 48).bfloat16()
    try:
        kept, counts = kept_and_counted(x, 0.5, 0.0, 3, 1)
        alone = nonzero_counts(x)  # compiled by itself
    except Exception:  # of a compiler, a driver or Triton itself, each in its own way
        return False
    expected = torch.cat([x[:1], kept_input(x[1:], 0.5)])
    if counts is None or not torch.equal(kept, expected):
        return False
    return counts.tolist() == _nonzeros(expected) and alone.tolist() == _nonzeros(x)


def _nonzeros(x: Tensor) -> list[int]:
    found: list[int] = x.ne(0).sum(-1).tolist()
    return found
