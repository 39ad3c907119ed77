"""Decodes batches of two to four sequences: weights that rest for all of them together are not read.

Every token has its own mask. A prompt tells how much rests for all sequences of its batch together; where this is less
than what was measured to be worth it for a shape, the masked definition computes, which reads all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding import products
from resting.sparsifier.decoding.contract import MOST_TOKENS
from resting.sparsifier.decoding.stand_in import DecodeStandIn
from resting.sparsifier.layers import SparseLinear
from resting.sparsifier.masking import Masking
from resting.sparsifier.projection import Projection
from resting.sparsifier.sites import Site


class BatchLinear(DecodeStandIn):
    """Runs a linear layer on the decoded tokens of a small batch, and by its masked definition on anything else.

    Parameters
    ----------
    masked : SparseLinear
        The definition. Its layer's weights are read as they lie, and only where they lie input-major.
    """

    stands_for = "linear"

    def __init__(self, masked: SparseLinear) -> None:
        super().__init__()
        self.masked, self.linear, self.tokens, self.rule = masked, masked.linear, masked.tokens, masked.rule
        weight = Projection.of(self.linear).weight
        self._product = products.union(self.rule, weight)
        self._bias = None if self.rule.bias is None else self.rule.bias.detach().to(weight.device, torch.float32)
        self._masking = Masking(self.rule)
        self.pays: int | None = None
        """Size of the batches for which the kernel is used, as the last prompt told."""

    def forward(self, x: Tensor) -> Tensor:
        shape = self.tokens.selection.shape
        if shape is None or tuple(x.shape[:2]) != shape or x.dim() != 3 or not 2 <= shape[0] <= MOST_TOKENS:
            return self.masked(x)
        if shape[1] > 1:
            self._look(x)
        elif self._takes(x):
            return self._product(x, Projection.of(self.linear).weight, self._start())
        return self.masked(x)

    def _takes(self, x: Tensor) -> bool:
        """Tells whether the kernel computes one token of every sequence of this batch."""
        if self.pays != len(x):
            return False
        selection, weight = self.tokens.selection, Projection.of(self.linear).weight
        all_sparse = selection.sparse is None and not selection.dense
        differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return all_sparse and not differentiates and (weight.shape[0] == 1 or weight.stride(0) == 1)

    @torch.no_grad()
    def _look(self, x: Tensor) -> None:
        """Decides by the inputs of a prompt [batch, length, in], token by token at the same place."""
        self.pays = None
        least = products.union_break_even(Projection.of(self.linear).weight, len(x))
        if least <= 1.0 and 1.0 - float((self._masking(x) != 0).any(0).float().mean()) >= least:
            self.pays = len(x)

    def _start(self) -> Tensor | None:
        own = self.linear.bias
        if own is None:
            return self._bias
        return own.detach().float() if self._bias is None else own.detach().float() + self._bias


def in_batches(masked: SparseLinear) -> nn.Module:
    """Gives a `BatchLinear` for a layer that has one, else the layer as it is.

    A layer without a mask, with a low-rank part or with weights of sparse tokens is computed densely in batches, and so
    is every layer on a CPU.
    """
    rule = masked.rule
    has_kernel = rule.low_rank is None and rule.weight is None and not rule.masks_nothing
    return BatchLinear(masked) if has_kernel and products.takes_batches(masked.linear.weight) else masked


@contextmanager
def batches(decoder: Decoder, layers: Iterable[tuple[Site, object]]) -> Iterator[None]:
    """Puts a `BatchLinear` in the place of every layer that has one, inside the ``with`` block."""
    with ExitStack() as stack:
        for site, layer in layers:
            if isinstance(layer, SparseLinear) and not site.is_expert:
                slot = decoder.slots[site]
                if slot.module is not layer:  # a neuron mask stands before it
                    continue
                stack.callback(slot.put, slot.module)
                slot.put(in_batches(layer))
        yield
