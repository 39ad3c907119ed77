"""Computes quantiles of magnitudes from one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resting.sparsifier.errors import DivergedError, SparsifierError

MANTISSA_BITS = 8
_SHIFT = 23 - MANTISSA_BITS
_SMALLEST, _INFINITY = 0x00800000, 0x7F800000  # the bits of 2^-126 and of infinity in fp32
_FIRST = _SMALLEST >> _SHIFT
BINS = (_INFINITY >> _SHIFT) - _FIRST


class Histogram:
    """Counts |x| in bins a 256th of a power of two wide, over the whole range of fp32.

    A bin is the leading bits of the float, so that one pass suffices: no range has to be known beforehand, and no
    outlier costs resolution (the quantile is exact to 0.4 % of its value).
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self._cumulative: Tensor | None = None

    @classmethod
    def together(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Counts what all of `histograms` count."""
        found = cls()
        for histogram in histograms:
            found.counts += histogram.counts
        return found

    def add(self, x: Tensor) -> None:
        """Counts the magnitudes of all entries of `x`.

        Raises
        ------
        DivergedError
            If an entry is NaN or infinite.
        """
        bits = x.detach().float().abs().flatten().view(torch.int32)
        if bits.numel() and int(bits.max()) >= _INFINITY:
            raise DivergedError("an activation is NaN or infinite")
        index = ((bits >> _SHIFT) - _FIRST).clamp_(0, BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu()
        self._cumulative = None

    def quantile(self, ratio: float) -> float:
        """Gives the magnitude that a share `ratio` of the entries does not exceed, interpolated inside its bin.

        Parameters
        ----------
        ratio : float
            In [0, 1]; 0 gives 0, so that nothing but exact zeros rests.
        """
        if not 0.0 <= ratio <= 1.0:
            raise SparsifierError(f"a quantile is taken at a ratio in [0, 1], got {ratio}")
        if self._cumulative is None:
            self._cumulative = self.counts.cumsum(0)
        cumulative = self._cumulative
        total = int(cumulative[-1])
        if not total:
            raise SparsifierError("the quantile of an empty histogram is not defined")
        wanted = ratio * total
        if wanted <= 0:
            return 0.0
        index = min(int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64))), BINS - 1)
        inside = int(self.counts[index])
        share = (wanted - (int(cumulative[index]) - inside)) / inside if inside else 1.0
        low, high = _edge(index), _edge(index + 1)
        return low + share * (high - low)


def _edge(index: int) -> float:
    if index == BINS:
        return 2.0**128
    bits = torch.tensor((index + _FIRST) << _SHIFT, dtype=torch.int32)
    return 0.0 if index == 0 else float(bits.view(torch.float32))
