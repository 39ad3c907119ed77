"""Lays the weights of layers that read one input side by side, input-major, in place of their usual order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resting.sparsifier.decoding.contract import keep_in_order
from resting.sparsifier.errors import SparsifierError


class SideBySide:
    """Holds the weights of layers as one matrix [out, in], whose store is input-major; the layers have views of it.

    Parameters
    ----------
    linears : sequence of nn.Linear
        They read the same input.
    weights : sequence of Tensor [out, in], optional
        Those of each layer; a layer whose own weights are others keeps them as they are.

    Raises
    ------
    SparsifierError
        If some of the layers were made in inference mode and others were not.
    """

    @torch.no_grad()
    def __init__(self, linears: Sequence[nn.Linear], weights: Sequence[Tensor] | None = None) -> None:
        self._linears = list(linears)
        self.widths = [linear.weight.shape[0] for linear in linears]
        like = linears[0].weight
        given = [linear.weight for linear in linears] if weights is None else weights
        if len({linear.weight.is_inference() for linear in linears}) > 1:
            raise SparsifierError("layers that read one input were made partly in inference mode: load the model anew")
        with torch.inference_mode(like.is_inference()), torch.no_grad():  # as `keep_in_order` says
            major = torch.empty(like.shape[1], sum(self.widths), dtype=like.dtype, device=like.device)
            for linear, weight, part in zip(linears, given, major.split(self.widths, 1)):
                part.copy_(weight.t())
                if weight is linear.weight:
                    linear.weight.data = part.t()
        self.weight: Tensor = major.t()

    def part(self, i: int) -> Tensor:
        """Gives the weights of one of the layers, as a view."""
        return self.weight.split(self.widths)[i]

    def restore(self) -> None:
        """Puts the weights back into their usual order, each layer its own."""
        for linear in self._linears:
            keep_in_order(linear.weight, Tensor.contiguous)
        del self.weight
