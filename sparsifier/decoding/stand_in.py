"""Defines what modules of decode kernels have in common."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.layers import StandIn
from resting.sparsifier.projection import Projection
from resting.sparsifier.rule import Rule


class DecodeStandIn(StandIn):
    """Stands for a module whose weights a kernel holds."""

    def _load_from_state_dict(self, *args: object) -> NoReturn:
        raise SparsifierError("weights cannot be loaded while decode kernels hold them: leave the `with` block first")


def start_of(matrix: Projection, rule: Rule) -> Tensor | None:
    """Adds the layer's own bias and the rule's."""
    biases = [b.detach().float() for b in (matrix.bias, rule.bias) if b is not None]
    return sum(biases[1:], biases[0].to(matrix.weight.device)) if biases else None
