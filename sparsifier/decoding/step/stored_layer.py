"""A layer of a cache whose keys and values lie in a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from resting.sparsifier.decoding.step.places import Places

TAKEN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""What can be put into a store; a subclass may keep more than keys and values, and is not taken."""
COUNTERS = ("cumulative_length", "cumulative_length_int")
"""Where transformers' layers count their tokens, beside the keys' own length."""


@dataclass(eq=False)
class Loan:
    """Says which places of a store are a layer's.

    Attributes
    ----------
    layer : weak reference to StoredLayer
    store : Places
    index : int
        Of the layer.
    origin : type
        What the layer is outside of the store.
    length : int
        Tokens that it has seen; -1 once it has left the store.
    first : int
        The first place that holds one of its tokens: a window may have dropped those before.
    window : int, optional
        Tokens that one of them attends to, itself included.
    capacity : int, optional
        Tokens that a static layer has room for.
    """

    layer: ref[StoredLayer]
    store: Places
    index: int
    origin: Any
    length: int
    first: int
    window: int | None
    capacity: int | None

    def begin(self, keeps_past: bool = False) -> int:
        """Gives the first place that a next token needs; of a layer that can be rolled back, the first of all."""
        if self.window is None or keeps_past:
            return self.first
        return max(self.first, self.length - self.window + 1)


class StoredLayer(CacheLayerMixin):
    """Is a layer of a cache while its keys and values lie in a store.

    No object is made of this class: `lend` makes a layer one for as long as its keys and values are in the store, and
    `leave` makes it again what it was, so that whoever has the layer or its cache need not know. What is not done in
    the store (another order of the batch, another dtype, gradients) is done by the layer after it has left.
    """

    is_compileable = False
    is_croppable = True
    loan: Loan

    @property
    def keys(self) -> Tensor | None:
        """Gives keys of the layer's own, which the store never overwrites: the layer leaves it."""
        self.leave()
        return self.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.leave()
        self.keys = keys

    @property
    def values(self) -> Tensor | None:
        """Gives values of the layer's own, like `keys`."""
        self.leave()
        return self.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.leave()
        self.values = values

    @property
    def cumulative_length(self) -> int:
        """Counts the tokens that the layer has seen."""
        return self.loan.length

    cumulative_length_int = cumulative_length

    @property
    def _begin(self) -> int:
        return self.loan.begin(self.__dict__.get("record_past", False))

    def _shown(self, tensors: list[Tensor], begin: int) -> Tensor:
        return tensors[self.loan.index][None, :, begin : self.loan.length]

    def __getattr__(self, name: str) -> Any:
        """Finds what the layer has outside of the store; a method is called after it has left."""
        loan = self.__dict__.get("loan")
        found = getattr(CacheLayerMixin if loan is None else loan.origin, name)
        return _after_leaving(name).__get__(self) if callable(found) else found

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the keys and values [1, groups, new, size] of new tokens, and gives those that they attend to."""
        loan = self.loan
        end = loan.length + key_states.shape[-2]
        if not self._fits(key_states, value_states, end):
            self.leave()
            updated: tuple[Tensor, Tensor] = self.update(key_states, value_states, *args, **kwargs)
            return updated
        loan.store.ensure(end)
        loan.store.quiet()
        begin = loan.begin()
        for tensors, new in ((loan.store.keys, key_states), (loan.store.values, value_states)):
            tensors[loan.index][:, loan.length : end] = new[0]
        loan.length = end
        return self._shown(loan.store.keys, begin), self._shown(loan.store.values, begin)

    def _fits(self, keys: Tensor, values: Tensor, end: int) -> bool:
        if torch.is_grad_enabled():  # a backward pass may want what the next token would write over
            return False
        loan = self.loan
        return end <= (end if loan.capacity is None else loan.capacity) and all(
            like(place[loan.index], new) for place, new in ((loan.store.keys, keys), (loan.store.values, values))
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes ``-tokens_to_remove`` tokens off the end; a positive number means what it does outside of the store."""
        loan = self.loan
        length = loan.length + tokens_to_remove
        needed = 0 if loan.window is None else max(0, length - loan.window + 1)
        if tokens_to_remove > 0 or length < 0 or needed < loan.first:
            self.leave()
            self.crop(tokens_to_remove)
        else:
            loan.length = length

    def activate_past_recording(self) -> None:
        """Lets a window keep the tokens before it, for a later `crop`: the store does anyway."""
        if "record_past" in self.__dict__:
            self.record_past = True

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Gives the number of keys that `query_length` new tokens attend to, and the place of the first."""
        new = query_length if isinstance(query_length, int) else len(query_length)  # transformers 5.0 gives positions
        loan = self.loan
        begin = 0 if loan.window is None else max(0, loan.length - loan.window + 1)
        return loan.length + new - begin, begin

    def get_seq_length(self) -> int:
        """Counts the tokens that the layer has seen."""
        return self.loan.length

    def get_max_length(self) -> int:
        """Gives the number of tokens that the layer holds at most; -1 for any."""
        return self.loan.window or self.loan.capacity or -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Has been done: there are keys."""

    def leave(self) -> None:
        """Becomes again what the layer was, with keys and values of its own."""
        loan = self.__dict__.pop("loan")
        shown = _own(self, loan)
        loan.length = -1
        self.__class__ = loan.origin
        self.__dict__.update(shown)

    def __reduce_ex__(self, _: Any) -> Any:
        """Copies and pickles what the layer is outside of the store, with keys and values of its own."""
        other = self.loan.origin.__new__(self.loan.origin)
        other.__dict__.update(self.__dict__)
        del other.__dict__["loan"]
        other.__dict__.update(_own(self, self.loan))
        return other.__reduce_ex__(0)  # later protocols ask for an object of the class that is written


def _after_leaving(name: str) -> Callable[..., Any]:
    """Makes a method that a layer does outside of the store."""

    def method(self: StoredLayer, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        return getattr(self, name)(*args, **kwargs)

    return method


for _name in ("reset", "reorder_cache", "offload", "prefetch"):
    setattr(StoredLayer, _name, _after_leaving(_name))


def like(place: Tensor, new: Tensor) -> bool:
    """Tells whether `new` [1, groups, tokens, size] can lie in `place` [groups, places, size] as it is."""
    return (
        new.dim() == 4
        and not new.requires_grad
        and (len(new), new.shape[1], new.shape[3]) == (1, place.shape[0], place.shape[2])
        and (new.dtype, new.device) == (place.dtype, place.device)
    )


def lend(layer: Any, store: Places, index: int, length: int) -> Loan:
    """Copies the `length` tokens of a layer of `TAKEN` into the store, and makes it a `StoredLayer`."""
    origin, kept = type(layer), layer.__dict__
    static = issubclass(origin, StaticLayer)
    # What static layers hold is filled from the left, and moves to the left once it is full.
    have = min(length, layer.keys.shape[-2])
    for places, tensor in ((store.keys, layer.keys), (store.values, layer.values)):
        places[index][:, length - have : length] = tensor[0, :, :have]
    window = kept.get("max_cache_len") if origin is StaticSlidingWindowLayer else kept.get("sliding_window")
    capacity = kept["max_cache_len"] if static and window is None else None
    for name in ("keys", "values", *COUNTERS):
        kept.pop(name, None)
    layer.__class__ = StoredLayer
    layer.loan = Loan(ref(layer), store, index, origin, length, length - have, window, capacity)
    return layer.loan


def has(layer: Any, length: int) -> bool:
    """Tells whether a layer of `TAKEN` has all of its `length` tokens that a next one can attend to."""
    if not layer.is_initialized or int(layer.get_seq_length()) != length:
        return False
    if isinstance(layer, StaticLayer):
        return True
    window = getattr(layer, "sliding_window", None)
    return bool(layer.keys.shape[-2] >= (length if window is None else min(length, window - 1)))


def _own(layer: StoredLayer, loan: Loan) -> dict[str, Any]:
    """Copies what `layer` holds, into the attributes that it has outside of the store."""
    length = loan.length
    with torch.inference_mode(False):
        if issubclass(loan.origin, StaticLayer):
            begin = max(0, length - (loan.window or length))  # the oldest of a window's is not attended to again
            held = [places[loan.index][None, :, begin:length] for places in (loan.store.keys, loan.store.values)]
            size = layer.__dict__["max_cache_len"]
            fresh = loan.origin(size) if loan.window is None else loan.origin(size, sliding_window=size)
            fresh.update(*held)
            own = dict(fresh.__dict__)
            for name in COUNTERS:
                if isinstance(own.get(name), int):  # of all that it has seen, not of what a window kept
                    own[name] = length
            return own
        begin = loan.begin(layer.__dict__.get("record_past", False))
        own = {
            "keys": loan.store.keys[loan.index][None, :, begin:length].clone(),
            "values": loan.store.values[loan.index][None, :, begin:length].clone(),
        }
    return own if loan.window is None else own | {"cumulative_length": length}
