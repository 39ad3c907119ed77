"""Computes the mean and variance of every channel, with its sign, from one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resting.sparsifier.errors import DivergedError, SparsifierError


class ChannelMoments:
    """Computes the signed mean and the variance of every channel, in fp64.

    Sums are of deviations from the mean so far (Chan et al., 1979), so that a channel far from zero keeps its variance.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    @classmethod
    def together(cls, moments: Iterable[ChannelMoments]) -> ChannelMoments:
        """Gives the moments of all tokens of `moments`."""
        found = cls()
        for one in moments:
            if one._mean is not None and one._squares is not None:
                found._join(one.tokens, one._mean, one._squares)
        return found

    def add(self, x: Tensor) -> None:
        """Counts `x` [tokens, channels].

        Raises
        ------
        DivergedError
            If an entry is NaN or infinite.
        """
        if not len(x):
            return
        x = x.detach().double()
        mean = x.mean(0)
        squares = (x - mean).square_().sum(0).cpu()
        if not bool(torch.isfinite(squares).all()):
            raise DivergedError("an activation is NaN or infinite")
        self._join(len(x), mean.cpu(), squares)

    def _join(self, tokens: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.tokens, self._mean, self._squares = tokens, mean, squares
            return
        total, apart = self.tokens + tokens, mean - self._mean
        self._squares = self._squares + squares + apart.square() * (self.tokens * tokens / total)
        self._mean = self._mean + apart * (tokens / total)
        self.tokens = total

    @property
    def mean(self) -> Tensor:
        """Gives E[x], [channels] in fp64."""
        if self._mean is None:
            raise SparsifierError("moments of no token are not defined")
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Gives E[(x - E[x])^2], [channels] in fp64."""
        if self._squares is None:
            raise SparsifierError("moments of no token are not defined")
        return self._squares / self.tokens
