"""Prepares products of one token with quantised weights on a CPU, once for a layer."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.decoding import cpu_numba, cpu_quantised
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.rule import Vector

_WIDENING = {torch.float16: (1 << 13, 0x38000000), torch.bfloat16: (1 << 16, 0)}
"""What the bits of a scale are multiplied with, and what is added, to give those of the same number in float32."""
_SMALLEST = torch.finfo(torch.float16).smallest_normal


class CpuQuantised:
    """Computes ``W (x - shift)_kept + U V (x - x_kept) + bias`` from the codes of W, on CPU threads.

    Parameters
    ----------
    held : QuantisedWeight
        Of 8 or 4 bits and symmetric.
    dtype : torch.dtype
        Of inputs, outputs and factors: float32 or bfloat16.
    cutoff, shift : float or Tensor [in]
        As `Rule.cutoff` gives them for `dtype`; a cutoff of -1 keeps every input.
    bias : Tensor [out], optional
    threads : int
    factors : (Tensor [out, r], Tensor [r, in]), optional
        U and V; not with a shift.

    Raises
    ------
    SparsifierError
        If there is no kernel for the format.
    """

    def __init__(
        self,
        held: QuantisedWeight,
        dtype: torch.dtype,
        cutoff: Vector,
        shift: Vector = 0.0,
        bias: Tensor | None = None,
        threads: int = 1,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        form = held.format
        lanes = cpu_quantised.LANES * (2 if form.bits == 4 else 1)
        if form.bits not in (4, 8) or form.zero or form.group % lanes:
            raise SparsifierError(
                f"there is no CPU kernel for {form.name}; allowed: symmetric codes of 8 or 4 bits in groups of "
                f"{cpu_quantised.LANES} (of 4 bits {2 * cpu_quantised.LANES}) outputs or multiples, as int8, int4-g128"
            )
        if held.scales.dtype == torch.float16 and bool((held.scales < _SMALLEST).any()):
            raise SparsifierError("scales of float16 are to be positive and normal")
        self._out, width = held.outputs, held.inputs
        codes = held.codes.contiguous().numpy() if form.bits == 8 else packed(held.codes, form.group)
        codes = apart(codes)
        self._scales = held.scales.contiguous().view(torch.uint16).numpy().copy()
        stream = cpu_quantised.gemv8 if form.bits == 8 else cpu_quantised.gemv4
        if threads > 1:
            stream = cpu_quantised.gemv8_parallel if form.bits == 8 else cpu_quantised.gemv4_parallel
        times, add = _WIDENING[held.scales.dtype]
        like = np.empty(0, np.float32 if dtype == torch.float32 else np.uint16)
        self._kernel = partial(stream, codes, self._scales, np.uint32(times), np.uint32(add), form.group, like)
        self._more = () if threads == 1 else (threads,)
        moves = isinstance(shift, Tensor) or shift != 0.0
        self._shift = _vector(torch.as_tensor(shift).to(dtype), width) if moves else _vector(0.0, 0)
        self._cutoff = _vector(cutoff, width)
        self._start = _vector(0.0, 0) if bias is None else _vector(bias, self._out)
        rank = 0 if factors is None else factors[1].shape[0]
        longest = max(width, rank) + 1
        self._scratch = np.empty(longest, np.int64), np.empty(longest, np.float32), np.empty(self._out, np.float32)
        self._scaled = np.empty((threads, cpu_quantised.ROWS[form.bits], self._scales.shape[1]), np.float32)
        self._low_rank = None
        if factors is not None:
            u, v = (_array(f.to(dtype).t().contiguous()) for f in factors)
            base = np.empty(self._out, np.float32)
            prepared = self._cutoff, self._start, base, *self._scratch[:2], np.empty(rank, np.float32)
            self._low_rank = partial(cpu_numba.low_rank, u, v)
            self._prepared, self._start = prepared, base

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product [..., out] with `x` [..., in] of one token."""
        x = x if x.is_contiguous() else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._out)
        at = x.data_ptr()
        if self._low_rank is not None:
            self._low_rank(at, *self._prepared)
        scratch, start = self._scratch, self._start
        self._kernel(at, self._shift, self._cutoff, start, y.data_ptr(), *scratch, self._scaled, *self._more)
        return y


def apart(rows: np.ndarray) -> np.ndarray:
    """Copies rows so that they begin an odd number of cache lines apart, with bytes between them that nothing reads.

    Where they begin a power of two apart, the same columns of all rows compete for the same few places in a cache.
    Numpy asks for huge pages, so that not every row begins a page of its own.
    """
    lines = -(-rows.shape[1] // cpu_quantised.LINE)
    wide = np.zeros((len(rows), (lines + 1 - lines % 2) * cpu_quantised.LINE), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide


def packed(codes: Tensor, group: int) -> np.ndarray:
    """Packs codes of 4 bits [in, out] into bytes [in, out / 2].

    Byte c of a group holds code c, plus 8, in its low half and code ``c + group / 2``, plus 8, in its high one.
    """
    halves = (codes.to(torch.int16) + 8).view(codes.shape[0], -1, 2, group // 2)
    both = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return both.to(torch.uint8).reshape(codes.shape[0], -1).contiguous().numpy()


def _array(weight: Tensor) -> np.ndarray:
    plain = weight.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _vector(value: Vector, width: int) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().float().expand(width).contiguous().numpy()
