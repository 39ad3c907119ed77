"""Gives a forward that gradient checkpointing repeats the sparse tokens that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.token_tracker import TokenTracker

FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a transformers module that runs part of its forward, and runs it again in the backward pass."""


@contextmanager
def repeatable(trunk: nn.Module, tracker: TokenTracker) -> Iterator[None]:
    """Makes repeated forwards of blocks select the tokens that they selected first, inside the ``with`` block.

    A backward pass after it would repeat the forward of dense layers: that is refused.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]] = []
    is_open = True

    def bound(run: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            selection = tracker.selection

            def forward(*args: Any, **kwargs: Any) -> Any:
                if not is_open:
                    raise SparsifierError(
                        "a backward pass repeats a forward under a plan: call it inside the `with` block of that plan"
                    )
                with tracker.repeated(selection):
                    return function(*args, **kwargs)

            return run(forward, *args, **kwargs)

        return checkpointed

    def bind(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not (trunk.training and torch.is_grad_enabled()):
            return
        known = {ours for _, ours, _ in replaced}
        for child in trunk.modules():
            run = vars(child).get(FUNCTION)
            if run is not None and run not in known:
                replaced.append((child, bound(run), run))
                setattr(child, FUNCTION, replaced[-1][1])

    hook = trunk.register_forward_pre_hook(bind)
    try:
        yield
    finally:
        is_open = False
        hook.remove()
        for child, ours, run in reversed(replaced):
            if vars(child).get(FUNCTION) is ours:
                setattr(child, FUNCTION, run)
