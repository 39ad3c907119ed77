"""Runs a model on a few tokens and keeps what goes in and out of its blocks, to tell what is between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.step.arguments import ATTENTION
from resting.sparsifier.errors import SparsifierError

TOKENS = 5
"""Tokens of a run."""
SHORT = 2
"""A window that hides the first of them from the last."""


class UnknownFormError(SparsifierError):
    """Says why a model's blocks have no known form."""


@dataclass
class Run:
    """Keeps what went through a model in one forward of a few tokens.

    Attributes
    ----------
    into, out : list of Tensor [1, tokens, width]
        Of every call of a block, in their order.
    masks : list of Tensor or None
        What each call was told of the tokens that it sees.
    normed : Tensor [1, tokens, width], optional
        What the trunk gives.
    embedded : Tensor [1, tokens, width], optional
        What the embedding's own module gives.
    logits : float32 Tensor [tokens, vocabulary], optional
    """

    into: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    normed: Tensor | None = None
    embedded: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def of(cls, model: Any, decoder: Decoder) -> Run:
        """Runs `model` once."""
        run, embedding = cls(), model.get_input_embeddings()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.into.append(args[0] if args else kwargs["hidden_states"])
            run.masks.append(kwargs.get("attention_mask"))

        def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            run.out.append(out[0] if isinstance(out, tuple) else out)

        def whole(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            run.normed = out[0]

        hooks = [decoder.trunk.register_forward_hook(whole)]
        for layer in decoder.layers:
            hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        ids = torch.arange(TOKENS, device=embedding.weight.device)[None] % embedding.weight.shape[0]
        try:
            run.logits = model(input_ids=ids, use_cache=False).logits[0].float()
            run.embedded = embedding(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return run

    def check_between(self, blocks: int) -> None:
        """Refuses a trunk that does anything between its blocks, or does not call each of them once.

        Raises
        ------
        UnknownFormError
        """
        if len(self.into) != blocks or len(self.out) != blocks:
            raise UnknownFormError(f"a forward calls {len(self.into)} blocks, and there are {blocks}")
        for i, (given, taken) in enumerate(zip(self.out, self.into[1:])):
            if not torch.equal(given, taken):
                raise UnknownFormError(f"what goes into block {i + 1} is not what comes out of block {i}")


def check_attention(config: Any) -> None:
    """Refuses a model whose attention is not computed in one of the known ways.

    Raises
    ------
    UnknownFormError
    """
    if config._attn_implementation not in ATTENTION:
        raise UnknownFormError(
            f"its attention is computed by {config._attn_implementation!r}, not by {', '.join(sorted(ATTENTION))}"
        )


def windows_of(model: Any, config: Any, decoder: Decoder) -> list[int | None]:
    """Tells how many tokens each block sees: what transformers' own cache keeps for it, and the model's masks hide.

    Raises
    ------
    UnknownFormError
        If the two differ, or the cache is of another kind.
    """
    from transformers import DynamicCache

    blocks = decoder.blocks
    layers = DynamicCache(config=config).layers
    if len(layers) < blocks:
        raise UnknownFormError("its blocks do not keep one entry each in a cache")
    found: list[int | None] = []
    for layer in layers[:blocks]:
        if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise UnknownFormError(f"its cache holds a {type(layer).__name__}")
        found.append(getattr(layer, "sliding_window", None))
    if getattr(config, "sliding_window", None) is None:
        if any(found):
            raise UnknownFormError("its cache has a window, and its config has none")
        return found
    with eager(config), _set(config, "sliding_window", SHORT):
        masks = Run.of(model, decoder).masks
    for i, (mask, window) in enumerate(zip(masks, found)):
        hides = isinstance(mask, Tensor) and bool(mask[0, 0, -1, 0] < -1)
        if hides != (window is not None):
            says, does = ("a", "none") if window is not None else ("no", "one")
            raise UnknownFormError(f"the cache has {says} window for block {i}, and the model's mask has {does}")
    return found


@contextmanager
def eager(config: Any) -> Iterator[None]:
    """Makes attention computed by the formula, which takes float32 and any mask."""
    with _set(config, "_attn_implementation", "eager"):
        yield


@contextmanager
def _set(config: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
