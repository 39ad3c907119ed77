"""Prepares products of one token with quantised weights on a CPU, once for a layer."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.decoding import cpu_numba, cpu_quantised
from resting.sparsifier.decoding.cpu_quantised_layout import by_inputs
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.rule import Vector


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
        If there is no kernel for the format, or for a scale.
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
        self._out, width = held.outputs, held.inputs
        laid = by_inputs(held)
        self._scales = laid.scales
        kernel = cpu_quantised.gemv if threads == 1 else cpu_quantised.gemv_parallel
        like = np.empty(0, np.float32 if dtype == torch.float32 else np.uint16)
        self._kernel = partial(kernel, *laid, held.format.group, like)
        self._more = () if threads == 1 else (threads,)
        moves = isinstance(shift, Tensor) or shift != 0.0
        self._shift = _vector(torch.as_tensor(shift).to(dtype), width) if moves else _vector(0.0, 0)
        self._cutoff = _vector(cutoff, width)
        self._start = _vector(0.0, 0) if bias is None else _vector(bias, self._out)
        rank = 0 if factors is None else factors[1].shape[0]
        longest = max(width, rank) + 1
        self._scratch = np.empty(longest, np.int64), np.empty(longest, np.float32), np.empty(self._out, np.float32)
        self._scaled = np.empty((threads, cpu_quantised.ROWS[held.format.bits], self._scales.shape[1]), np.float32)
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


def _array(weight: Tensor) -> np.ndarray:
    plain = weight.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _vector(value: Vector, width: int) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().float().expand(width).contiguous().numpy()
