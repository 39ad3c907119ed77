"""Keeps the residual stream of one token as sums, to which products add."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda.arguments import StreamArguments
from resting.sparsifier.decoding.cuda.compiled import function
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.variant import Variant

WARPS = 32
STEPS = {torch.bfloat16: 10, torch.float16: 12}
"""Bits of fixed point for a typical number of the first block's input: a little more than the dtype tells apart. More
would leave less room for what later blocks add, which is larger: each part that takes both words costs every reader."""


class Stream:
    """Holds the residual stream [width]: numbers in the model's dtype before the first block and after the last.

    Parameters
    ----------
    width : int
    typical : float
        Root mean square of what comes into the first block.
    dtype : torch.dtype
    device : torch.device
    """

    def __init__(self, width: int, typical: float, dtype: torch.dtype, device: torch.device) -> None:
        usual = typical if math.isfinite(typical) and typical > 0.0 else 1.0
        exponent = max(0, min(24, math.ceil(STEPS[dtype] - math.log2(usual))))
        self.sums = Sums(width, 2.0**exponent, device)
        self.sums.register(1)
        self._dtype, self._device = dtype, device
        self._arguments = StreamArguments(
            low=self.sums.words.data_ptr(),
            steps=self.sums.steps,
            unit=self.sums.unit,
            count=width,
            width=self.sums.width,
        )
        size = ctypes.sizeof(StreamArguments)
        chained, half = cuda_overlap.chained(device), dtype == torch.float16
        self._begin, self._finish = (
            function(Variant(name, size, half=half, warps=WARPS, chained=chained), device)
            for name in ("begin", "finish")
        )

    def begin(self, x: Tensor) -> None:
        """Makes sums of `x` [..., width]."""
        self._arguments.x, self._arguments.limit = x.data_ptr(), self.sums.limit
        with cuda_overlap.on(self._device):
            self._begin((1, 1), self._arguments)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gives the stream [1, 1, width] in the model's dtype, and the sum of its squares, float32 [1]."""
        x = torch.empty(1, 1, self.sums.count, dtype=self._dtype, device=self._device)
        squares = torch.empty(1, dtype=torch.float32, device=self._device)
        self._arguments.x, self._arguments.squares = x.data_ptr(), squares.data_ptr()
        with cuda_overlap.on(self._device):
            self._finish((1, 1), self._arguments)
        return x, squares
