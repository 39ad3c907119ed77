"""Keeps keys and values of one sequence at fixed places in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resting.sparsifier.errors import SparsifierError

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
    limit : int, optional
        Tokens that a sequence can have; any number where None.

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
        limit: int | None = None,
    ) -> None:
        self.limit = limit
        self.places = FIRST
        self.version = 0
        self.quiet: Callable[[], None] = lambda: None
        with torch.inference_mode(False):  # or nothing could be written to them outside of it
            like_all = torch.empty(0, dtype=dtype, device=device)
            self.keys = [like_all.new_zeros(groups, FIRST, size) for groups, size, _ in shapes]
            self.values = [like_all.new_zeros(groups, FIRST, size) for groups, _, size in shapes]

    def ensure(self, tokens: int) -> None:
        """Makes room for so many tokens, and keeps what is there.

        Raises
        ------
        SparsifierError
            If they are more than `limit`.
        """
        if self.limit is not None and tokens > self.limit:
            raise too_long(tokens, self.limit)
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


def too_long(tokens: int, limit: int) -> SparsifierError:
    """Says that a sequence is longer than allowed."""
    return SparsifierError(f"a sequence of {tokens} tokens is longer than the {limit} that this model has places for")


def limit_of(config: Any) -> int | None:
    """Gives the number of tokens that a model with this config has positions for; None where it scales them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *rope.values()]  # some families have one for each kind of layer
    if any(isinstance(kind, dict) and kind.get("rope_type", "default") != "default" for kind in kinds):
        return None
    return getattr(config, "max_position_embeddings", None)
