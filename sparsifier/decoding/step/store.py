"""Lends places for keys and values to the cache whose sequence is decoded."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from resting.sparsifier.decoding.step.places import Places
from resting.sparsifier.decoding.step.stored_layer import TAKEN, Loan, has, lend, like
from resting.sparsifier.errors import SparsifierError


class Store(Places):
    """Keeps the keys and values of one sequence, that of one cache at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loans: list[Loan] = []

    def length_of(self, cache: Any) -> int:
        """Counts the tokens of `cache` if all of its layers lie in the store, equally long; else -1."""
        loans, layers = self._loans, getattr(cache, "layers", ())
        if not loans or len(layers) != len(loans):
            return -1
        length = loans[0].length
        for loan in loans:
            if loan.length != length:
                return -1
        return length if all(map(is_, layers, [loan.layer() for loan in loans])) else -1

    def takes(self, cache: Any, past: int) -> bool:
        """Makes the `past` tokens of `cache` those of the store, unless they are; its layers become `StoredLayer`.

        The cache that the store held before gets keys and values of its own.

        Returns
        -------
        bool
            False, and nothing is done, where the cache is not one that keeps all keys and values of one sequence as
            they are: quantised, offloaded, of an encoder, of a batch, or of an unknown class.

        Raises
        ------
        SparsifierError
            If `past` and one more token are more than a static cache holds.
        """
        held = self.length_of(cache) == past
        if not held and not self._can_take(cache, past):
            return False
        if not held:
            self.settle()
            self.ensure(past + 1)
            with torch.inference_mode(False):
                for i, layer in enumerate(cache.layers):
                    self._loans.append(lend(layer, self, i, past))
        capacity = self._capacity
        if capacity is not None and past >= capacity:
            raise SparsifierError(f"a static cache for {capacity} tokens has no place for {past + 1}")
        return True

    def takes_if_it_fits(self, cache: Any, past: int) -> bool:
        """Does as `takes`; False in place of an error where there is no room for one more token."""
        if any(getattr(layer, "max_cache_len", past + 1) <= past for layer in cache.layers if not layer.is_sliding):
            return False
        return self.takes(cache, past)

    @property
    def _capacity(self) -> int | None:
        return min((loan.capacity for loan in self._loans if loan.capacity is not None), default=None)

    def _can_take(self, cache: Any, past: int) -> bool:
        if type(cache) not in (Cache, DynamicCache, StaticCache) or cache.offloading:
            return False
        layers = cache.layers
        if past < 1 or len(layers) != len(self.keys) or len(set(map(id, layers))) != len(layers):
            return False
        mine = {id(loan.layer()) for loan in self._loans if loan.length == past}
        return all(
            (id(layer) in mine or (type(layer) in TAKEN and has(layer, past)))
            and like(self.keys[i], layer.keys)
            and like(self.values[i], layer.values)
            for i, layer in enumerate(layers)
        )

    def advance(self, tokens: int) -> None:
        """Says that the sequence has so many tokens now, whose keys and values a step has written."""
        for loan in self._loans:
            loan.length = tokens

    def settle(self) -> None:
        """Gives the cache that the store holds keys and values of its own, in layers of the kind that it had."""
        self.quiet()
        loans, self._loans = self._loans, []
        for loan in loans:
            layer = loan.layer()
            if layer is not None and loan.length >= 0:
                layer.leave()
