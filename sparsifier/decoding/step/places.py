"""Keeps keys and values of one sequence at fixed places in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

FIRST = 256
"""Places that there are at first; they are doubled as often as a sequence asks for."""


class Places:
    """Keeps the keys and values of one sequence.

    Parameters
    ----------
    shapes : sequence of (int, int, int)
        For each layer the number of heads with keys of their own, and the size of a key and of a value.
    dtype : torch.dtype
    device : torch.device

    Attributes
    ----------
    keys, values : list of Tensor [groups, places, size]
        One for each layer, zeros at first. Token i of a sequence is at place i, also in layers with a window.
    places : int
    quiet : callable
        Is called before anybody but the step writes to the places or moves them: a step may be writing ahead.
    version : int
        Counts how often `keys` and `values` were put elsewhere in memory: a graph over them is stale then.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.places = FIRST
        self.version = 0
        self.quiet: Callable[[], None] = lambda: None
        with torch.inference_mode(False):  # or nothing could be written to them outside of it
            like_all = torch.empty(0, dtype=dtype, device=device)
            self.keys = [like_all.new_zeros(groups, FIRST, size) for groups, size, _ in shapes]
            self.values = [like_all.new_zeros(groups, FIRST, size) for groups, _, size in shapes]

    def ensure(self, tokens: int) -> None:
        """Makes room for so many tokens, and keeps what is there."""
        if tokens <= self.places:
            return
        self.quiet()
        places = self.places
        while places < tokens:
            places *= 2
        with torch.inference_mode(False):
            for tensors in (self.keys, self.values):
                for i, old in enumerate(tensors):
                    grown = old.new_zeros(old.shape[0], places, old.shape[2])
                    grown[:, : self.places] = old
                    tensors[i] = grown
        self.places = places
        self.version += 1
