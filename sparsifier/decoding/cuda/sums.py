"""Keeps sums in fixed point, to which many programs add at once: whole numbers, so that no order changes a bit."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError

WORD = 32
"""Widths are filled up to multiples of it: the columns that share a word of marks."""
HIGHEST = 1 << 31
"""Is one more than what the low word of a sum holds."""
MARGIN = 2.0**-20
SMALLEST_LIMIT = 1 << 16
"""The low word takes 16 bits of every part that is divided, so no limit may be lower."""


class Sums:
    """Holds sums [n] of parts that are whole numbers of 1 / `steps`.

    A sum has a low word and a high one, which counts 2^16 of the low one's. Parts below `limit` go to the low word
    alone. As `limit` is 2^31 over the number of parts, that word cannot wrap, whatever the numbers are; larger parts
    take both words, and mark their column, which readers look at. So 64 bits are paid for only where they are needed.

    Parameters
    ----------
    count : int
        n.
    steps : float
        A power of two: what 1 is counted as.
    device : torch.device
    """

    def __init__(self, count: int, steps: float, device: torch.device) -> None:
        self._check(steps)
        self.count, self.steps, self.parts = count, steps, 0
        self.width = -(-count // WORD) * WORD
        self._words = 2 * self.width + self.width // WORD + 1
        self.words = torch.zeros(-(-self._words // 4) * 4, dtype=torch.int32, device=device)

    def scaled(self, steps: float) -> Sums:
        """Gives sums at the same place that count in other steps: for another product, after the place is zeros."""
        self._check(steps)
        other = copy(self)
        other.steps, other.parts = steps, 0
        return other

    def _check(self, steps: float) -> None:
        if steps <= 0.0 or math.frexp(steps)[0] != 0.5:
            raise SparsifierError(f"sums in fixed point take a power of two as their scale, not {steps!r}")

    def register(self, parts: int) -> None:
        """Tells that so many more parts are added to every sum before the sums are zeros again.

        Raises
        ------
        SparsifierError
            If there would be too many for the low word.
        """
        if HIGHEST // (self.parts + parts) < SMALLEST_LIMIT:
            raise SparsifierError(f"sums in fixed point take 32,768 parts, not {self.parts + parts:,}")
        self.parts += parts

    @property
    def limit(self) -> float:
        """Gives the smallest part, in steps, that takes both words: a little less, since kernels have it in float32."""
        return HIGHEST / max(1, self.parts) * (1.0 - MARGIN)

    @property
    def unit(self) -> float:
        """Gives the value of one step."""
        return 1.0 / self.steps

    @property
    def vectors(self) -> int:
        """Counts the pieces of 16 bytes that hold all of it, for who makes zeros of it."""
        return self.words.numel() // 4

    @property
    def wide(self) -> Tensor:
        """Tells which sums [n] take both words."""
        marks = self.words[2 * self.width : 2 * self.width + self.width // WORD]
        bits = torch.arange(WORD, device=marks.device, dtype=torch.int32)
        return ((marks[:, None] >> bits) & 1).flatten()[: self.count].bool()

    @property
    def values(self) -> Tensor:
        """Gives the sums [n] in float64, as a kernel would read them."""
        low, high = self.words[: 2 * self.width].view(2, -1)[:, : self.count].double()
        total = torch.where(self.wide, high * 65536.0 + low, low) * self.unit
        broken = self.words[self._words - 1] >> 1 & 1
        return torch.where(broken.bool(), torch.full_like(total, math.nan), total)


def steps_for(typical: float, parts: int) -> float:
    """Gives the power of two as a scale, such that parts of twice a `typical` sum stay in the low word.

    Parameters
    ----------
    typical : float
        Magnitude of a sum. Where it is a thousand times smaller than said, a step is still finer than what float16
        can tell apart; where it is larger, sums take both words.
    parts : int
        As of `Sums.register`.
    """
    usual = typical if math.isfinite(typical) and typical > 0.0 else 1.0
    exponent = math.floor(math.log2(HIGHEST / max(1, parts) / (2.0 * usual)))
    return 2.0 ** max(-40, min(60, exponent))
