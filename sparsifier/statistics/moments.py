"""Computes first and second moments of channels, from one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resting.sparsifier.errors import DivergedError, SparsifierError


class Moments:
    """Computes the mean magnitude and root mean square of every channel, summed in fp64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._magnitude: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    @classmethod
    def together(cls, moments: Iterable[Moments]) -> Moments:
        """Sums up what all of `moments` sum up."""
        found = cls()
        for one in moments:
            found.tokens += one.tokens
            found._magnitude = found._magnitude + one._magnitude
            found._square = found._square + one._square
        return found

    def add(self, x: Tensor) -> None:
        """Counts the magnitudes and squares of `x` [tokens, channels].

        Raises
        ------
        DivergedError
            If an entry is NaN or infinite, or its square is in fp32.
        """
        x = x.detach().float()
        square = x.square().sum(0, dtype=torch.float64).cpu()
        if not bool(torch.isfinite(square).all()):
            raise DivergedError("an activation, or its square, is NaN or infinite")
        self.tokens += len(x)
        self._magnitude = self._magnitude + x.abs().sum(0, dtype=torch.float64).cpu()
        self._square = self._square + square

    @property
    def mean_magnitude(self) -> Tensor:
        """Gives E|x|, [channels] in fp64."""
        return self._over_tokens(self._magnitude)

    @property
    def root_mean_square(self) -> Tensor:
        """Gives sqrt(E[x^2]), [channels] in fp64."""
        return self._over_tokens(self._square).sqrt()

    def _over_tokens(self, total: Tensor | float) -> Tensor:
        if not isinstance(total, Tensor) or not self.tokens:
            raise SparsifierError("moments of no token are not defined")
        return total / self.tokens
