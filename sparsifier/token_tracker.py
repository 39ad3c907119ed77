"""Keeps track of which tokens the forward that is running makes sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection, TokenPolicy, is_by_position


class TokenTracker:
    """Turns a policy into the selection of the present forward, by a pre-hook on the decoder's trunk."""

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self._selection: Selection | None = None

    @classmethod
    def fixed(cls, policy: TokenPolicy, selection: Selection) -> TokenTracker:
        """Makes a tracker with a given selection: for single blocks, which are called without their trunk."""
        tracker = cls(policy)
        tracker._selection = selection
        return tracker

    def watch(self, trunk: nn.Module) -> RemovableHandle:
        """Hooks onto `trunk`; the handle takes the hook off again."""
        return trunk.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @property
    def selection(self) -> Selection:
        """Gives the sparse tokens of the forward that is running."""
        if self._selection is None:
            raise SparsifierError("a layer of the plan was called outside a forward of its model")
        return self._selection

    def _before_forward(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens: Tensor | None = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        batch, length = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        packed = isinstance(mask, Tensor) and mask.shape == (batch, 1, length, length) and cache is None
        if packed and positions is not None and is_by_position(self.policy):
            # Sequences packed into one row: padding has position -1.
            self._selection = Selection(0, positions >= self.policy.dense_tokens(length, past))
            return
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise SparsifierError(
                "token policies need the attention mask [batch, length]; a static cache hides it: use the dynamic cache"
            )
        self._selection = Selection.of(self.policy, batch, length, past, mask)
