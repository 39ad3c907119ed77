"""Keeps track of which tokens the forward that is running makes sparse."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection, TokenPolicy, is_by_position
from resting.sparsifier.real_tokens import real_tokens


class Removable(Protocol):
    """Takes off what was put on."""

    def remove(self) -> None:
        """Takes it off."""
        ...


class _Both:
    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Sequence:
    """Tells by its cache, which it does not keep alive, the sequence that a forward was of.

    Parameters
    ----------
    cache : Cache, optional
        What the forward was given; None where it began without one.
    """

    def __init__(self, cache: Any = None) -> None:
        self._cache = None if cache is None else weakref.ref(cache)

    def made(self, output: Any) -> None:
        """Takes note of the cache that a forward made, in its `output`."""
        cache = getattr(output, "past_key_values", None)
        if cache is None and isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        if self._cache is None and cache is not None:
            self._cache = weakref.ref(cache)

    def is_that_of(self, other: Sequence) -> bool:
        """Tells whether both have one cache."""
        mine, its = (None if s._cache is None else s._cache() for s in (self, other))
        return mine is not None and mine is its


class TokenTracker:
    """Turns a policy into the selection of the present forward, by a pre-hook on the decoder's trunk.

    Attributes
    ----------
    is_decoding : bool
        Whether the present forward is of one sparse token: what decode kernels are for.
    sequence : Sequence
        That of the present forward.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.is_decoding = False
        self.sequence = Sequence()
        self._selection: Selection | None = None
        self._backward = -1  # the backward pass in which the selection was made
        self._dense: set[int | None] = set()  # of forwards that a backward pass may repeat; None where rows differ

    @classmethod
    def fixed(cls, policy: TokenPolicy, selection: Selection) -> TokenTracker:
        """Makes a tracker with a given selection: for single blocks, which are called without their trunk."""
        tracker = cls(policy)
        tracker._selection = selection
        return tracker

    def watch(self, trunk: nn.Module) -> Removable:
        """Hooks onto `trunk`; the handle takes the hooks off again."""
        return _Both(
            trunk.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            trunk.register_forward_hook(self._after_forward),
        )

    @property
    def selection(self) -> Selection:
        """Gives the sparse tokens of the forward that is running."""
        if self._selection is None:
            raise SparsifierError("a layer of the plan was called outside a forward of its model")
        if torch.is_grad_enabled() and _backward() != self._backward:
            return self._of_unknown_forward()
        return self._selection

    @contextmanager
    def repeated(self, selection: Selection) -> Iterator[None]:
        """Takes up an earlier `selection`: that of a forward which a backward pass repeats in part."""
        before = self._selection, self._backward
        self._backward = _backward()
        self._selection = replace(selection, counted=False) if self._backward != -1 else selection
        try:
            yield
        finally:
            self._selection, self._backward = before

    def _of_unknown_forward(self) -> Selection:
        """Selects tokens for a layer that a backward pass calls again, for whatever forward it was."""
        if None in self._dense or len(self._dense) > 1:
            raise SparsifierError(
                "a backward pass repeats a forward, and which one is not known: their sparse tokens differ; use the "
                "model's own gradient checkpointing, or call backward before the next forward"
            )
        assert self._selection is not None
        return replace(self._selection, shape=None, counted=False)

    def _before_forward(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args[1:]:
            kwargs = inspect.signature(trunk.forward).bind_partial(*args, **kwargs).arguments
        tokens: Tensor | None = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        selection = self._select(batch, length, kwargs)
        last = kwargs.get("logits_to_keep")
        if isinstance(last, int) and 0 < last < length:
            selection = replace(selection, last=last)
        self._selection, self._backward = selection, _backward()
        self.is_decoding = (batch, length) == (1, 1) and selection.tokens == 1
        if torch.is_grad_enabled():
            self._dense.add(selection.dense if selection.sparse is None else None)

    def _after_forward(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.sequence.made(output)

    def _select(self, batch: int, length: int, kwargs: dict[str, Any]) -> Selection:
        cache, mask, positions = (kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.sequence = Sequence(cache)
        if cache is None and positions is not None and _is_packed(mask, positions, batch, length):
            if not is_by_position(self.policy):
                raise SparsifierError(
                    f"sequences packed into one row have no length of their own, which {self.policy} asks for; "
                    "allowed: a policy by position, or one sequence a row"
                )
            # Padding has position -1.
            sparse = positions >= self.policy.dense_tokens(length, past)
            return Selection(0, sparse.expand(batch, -1), (batch, length), packed=True)
        real = real_tokens(mask, positions, batch, length, past, cache is not None)
        return Selection.of(self.policy, batch, length, past, real)


def _is_packed(mask: Any, positions: Tensor, batch: int, length: int) -> bool:
    """Tells whether a row holds several sequences: transformers sees it by the mask, or by positions that restart."""
    if mask is None and positions.dim() == 2:
        return bool((positions.diff() != 1).any())
    return isinstance(mask, Tensor) and mask.shape == (batch, 1, length, length)


def _backward() -> int:
    """Numbers the backward pass that is running in this thread; -1 for none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
