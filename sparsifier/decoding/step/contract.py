"""Says what a fast step of one token takes and gives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from resting.sparsifier.decoding.step.store import Store


class Step(Protocol):
    """Computes one token of one sequence over a store of keys and values.

    Attributes
    ----------
    store : Store
        Places from `past` on, and those before a layer's window, hold any numbers: a step lets none of them in.
    """

    store: Store

    def __call__(self, token: Tensor, past: int) -> Tensor:
        """Computes the logits [1, 1, vocabulary] after `token` [1, 1] (int64, on the model's device).

        Writes the token's keys and values to place `past` of every layer of the store, which has room for it. The
        logits may lie in memory that the next call overwrites. A call with the same `past` replaces the one before.

        Parameters
        ----------
        token : Tensor [1, 1]
        past : int
            Tokens of the sequence before this one, all of them in the store.
        """
        ...

    def renew(self) -> None:
        """Reads the weights again, which were written to: graphs and copies of them are stale."""
        ...

    def restore(self) -> None:
        """Gives back what the step holds, and puts weights back into their usual order."""
        ...
