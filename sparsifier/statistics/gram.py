"""Computes the second moment of inputs, channel by channel, from one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resting.sparsifier.errors import DivergedError, SparsifierError


class Gram:
    """Sums ``x x^T`` over tokens, in fp64; products of one batch are in fp32, or in fp64 where the model is."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    @classmethod
    def together(cls, grams: Iterable[Gram]) -> Gram:
        """Sums up what all of `grams` sum up."""
        found = cls()
        for gram in grams:
            found.tokens += gram.tokens
            if gram._sum is not None:
                found._sum = gram._sum.clone() if found._sum is None else found._sum + gram._sum
        return found

    def add(self, x: Tensor) -> None:
        """Adds the tokens of `x` [tokens, channels].

        Raises
        ------
        DivergedError
            If an entry is NaN or infinite, or a sum of products is in fp32.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        product = (x.T @ x).double()
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise DivergedError("an activation, or its square, is NaN or infinite")
        self.tokens += len(x)
        self._sum = product if self._sum is None else self._sum.add_(product)

    @property
    def second_moment(self) -> Tensor:
        """Gives E[x x^T], not centred, [channels, channels] in fp64."""
        if self._sum is None or not self.tokens:
            raise SparsifierError("the second moment of no token is not defined")
        return self._sum / self.tokens
