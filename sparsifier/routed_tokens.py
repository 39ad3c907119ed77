"""Tells which tokens each of a list of experts is called with: their module gathers them, and says nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker


class RoutedTokens:
    """Finds the rows that an expert is called with among the hidden states that the experts' owner was called with.

    Parameters
    ----------
    tracker : TokenTracker
    count : int
        Of experts.
    """

    def __init__(self, tracker: TokenTracker, count: int) -> None:
        self.tracker = tracker
        self.experts = [OneExpert() for _ in range(count)]
        self._hidden: Tensor | None = None

    def watch(self, stack: ExitStack, owner: nn.Module, experts: Sequence[nn.Module]) -> None:
        """Hooks onto the module that calls `experts`, and onto them, until `stack` closes."""
        stack.callback(owner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        for module, one in zip(experts, self.experts):
            stack.callback(module.register_forward_pre_hook(self._before_expert(one)).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._hidden = self.tracker.selection.by_token(hidden).flatten(0, 1)

    def _before_expert(self, one: OneExpert) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def find(module: nn.Module, args: tuple[Any, ...]) -> None:
            one.selection = self.tracker.selection.at(self._numbers(args[0].flatten(0, -2)))

        return find

    @torch.no_grad()
    def _numbers(self, x: Tensor) -> Tensor:
        """Gives the number of the token that each row of `x` [n, hidden] is.

        Raises
        ------
        SparsifierError
            If a row is none of them, or is two of which one is sparse and the other is not.
        """
        assert self._hidden is not None
        hidden = self._hidden
        key, order = _hashed(hidden).sort(stable=True)
        wanted = _hashed(x)
        first = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        last = (torch.searchsorted(key, wanted, right=True) - 1).clamp(min=0)
        numbers = order[first]
        if not torch.equal(hidden[numbers], x):
            raise SparsifierError(
                "an expert is called with something else than rows of the hidden states: which tokens they are is not "
                "known"
            )
        sparse = self.tracker.selection.at(torch.arange(len(hidden), device=hidden.device)).sparse
        if sparse is not None and not torch.equal(sparse[0, numbers], sparse[0, order[last]]):
            raise SparsifierError(
                "two tokens of equal hidden states come to an expert, one of them sparse and one dense"
            )
        return numbers


def _hashed(x: Tensor) -> Tensor:
    """Hashes each row of `x` [n, hidden]: sums of integers, which no order of adding changes."""
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    factors = torch.arange(1, 2 * x.shape[1], 2, device=x.device) * 0x9E3779B97F4A7C1
    return (bits * factors).sum(-1)


class OneExpert:
    """Holds the sparse tokens of the call of one expert that is running, as a `TokenTracker` does of a forward."""

    selection: Selection
    is_decoding = False


def tokens_by_site(
    decoder: Decoder, tracker: TokenTracker, stack: ExitStack
) -> Callable[[Site], TokenTracker | OneExpert]:
    """Watches the lists of experts of all blocks until `stack` closes.

    Returns
    -------
    callable
        From a site to what tells its sparse tokens.
    """
    routed: dict[int, RoutedTokens] = {}
    for block, found in enumerate(decoder.found):
        if found.listed is not None:
            experts = list(found.listed.module.children())
            routed[block] = RoutedTokens(tracker, len(experts))
            routed[block].watch(stack, found.listed.parent, experts)
    return lambda site: routed[site.block].experts[site.expert] if site.is_expert else tracker
