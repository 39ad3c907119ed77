"""Prepares products of one token on a CPU, once for a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.decoding import cpu_numba
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Vector


class CpuColumns:
    """Computes ``W (x - shift)_kept + U V (x - x_kept) + bias`` with weights kept input-major, on CPU threads.

    Parameters
    ----------
    weight : Tensor [out, in]
        With the strides of an input-major store (``weight.t()`` is contiguous).
    cutoff, shift : float or Tensor [in]
        As `Rule.cutoff` gives them for the dtype of `weight`; a cutoff of -1 keeps every input.
    bias : Tensor [out], optional
    threads : int
    factors : (Tensor [out, r], Tensor [r, in]), optional
        U and V; not with a shift.
    """

    def __init__(
        self,
        weight: Tensor,
        cutoff: Vector,
        shift: Vector = 0.0,
        bias: Tensor | None = None,
        threads: int = 1,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if not weight.t().is_contiguous():
            raise SparsifierError("column kernels take input-major weights: see `input_major`")
        width, self._out = weight.shape[1], weight.shape[0]
        self._kernel: Callable[..., int] = cpu_numba.gemv if threads == 1 else cpu_numba.gemv_parallel
        self._more = () if threads == 1 else (threads,)
        self._weight = _array(weight.t())
        moves = isinstance(shift, Tensor) or shift != 0.0
        self._shift = _vector(torch.as_tensor(shift).to(weight.dtype), width) if moves else _vector(0.0, 0)
        self._cutoff = _vector(cutoff, width)
        self._start = _vector(0.0, 0) if bias is None else _vector(bias, self._out)
        rank = 0 if factors is None else factors[1].shape[0]
        longest = max(width, rank) + 1
        self._scratch = np.empty(longest, np.int64), np.empty(longest, np.float32), np.empty(self._out, np.float32)
        if factors is not None:
            u, v = (_array(f.to(weight).t().contiguous()) for f in factors)
            base = np.empty(self._out, np.float32)
            prepared = self._cutoff, self._start, base, *self._scratch[:2], np.empty(rank, np.float32)
            self._low_rank = partial(cpu_numba.low_rank, u, v)
            self._prepared, self._start = prepared, base
        self._has_rank = factors is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product [..., out] with `x` [..., in] of one token."""
        x = x if x.is_contiguous() else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._out)
        at = x.data_ptr()
        if self._has_rank:
            self._low_rank(at, *self._prepared)
        scratch, start = self._scratch, self._start
        self._kernel(self._weight, at, self._shift, self._cutoff, start, y.data_ptr(), *scratch, *self._more)
        return y


class CpuRows:
    """Computes the rows of ``up`` where the activated gate does not rest, times that gate, on CPU threads.

    Parameters
    ----------
    weight : Tensor [rows, in]
        Output-major, as linear layers have it.
    cutoff : float or Tensor [rows]
    bias : Tensor [rows], optional
    threads : int
    """

    def __init__(self, weight: Tensor, cutoff: Vector, bias: Tensor | None = None, threads: int = 1) -> None:
        rows, width = weight.shape
        self._kernel: Callable[..., int] = cpu_numba.gated_rows if threads == 1 else cpu_numba.gated_rows_parallel
        self._more = () if threads == 1 else (threads,)
        self._weight = _array(weight.contiguous())
        self._cutoff = _vector(cutoff, rows)
        self._start = _vector(0.0, 0) if bias is None else _vector(bias, rows)
        self._scratch = (
            np.empty(rows + 1, np.int64),
            np.empty(rows + 1, np.float32),
            np.empty(rows, np.float32),
            np.empty(width, np.float32),
        )

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """Computes ``gate * (W x + bias)`` where ``|gate|`` exceeds the cutoff, else 0; `gate` is [..., rows]."""
        x = x if x.is_contiguous() else x.contiguous()
        gate = gate if gate.is_contiguous() else gate.contiguous()
        y = torch.empty_like(gate)
        at = x.data_ptr(), gate.data_ptr()
        self._kernel(self._weight, *at, self._cutoff, self._start, y.data_ptr(), *self._scratch, *self._more)
        return y


def _array(weight: Tensor) -> np.ndarray:
    """Shows the numbers of `weight` where they lie; bfloat16, which numpy lacks, as uint16."""
    plain = weight.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _vector(value: Vector, width: int) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().float().expand(width).contiguous().numpy()
