"""Says how a product takes its input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.variant import GATED, NORMED, PLAIN


@dataclass(frozen=True, eq=False)
class Input:
    """Says where an input comes from, and what is done with it before the product.

    Attributes
    ----------
    sums : Sums, optional
        It is read from these; else from numbers in the model's dtype, given with every call.
    gain, eps, rounds_first : Tensor [in], float, bool
        RMSNorm with these weights, which include an offset; the input is rounded before them or not. None for no norm.
    gated : int
        The input is twice as long, a gate and what it opens: this activation of the one (`cuda_norm.ACTIVATIONS`, from
        1), times the other. 0 for no gate.
    """

    sums: Sums | None = None
    gain: Tensor | None = None
    eps: float = 0.0
    rounds_first: bool = True
    gated: int = 0

    @property
    def kind(self) -> int:
        return NORMED if self.gain is not None else GATED if self.gated else PLAIN


AS_IT_IS = Input()
"""Takes numbers in the model's dtype."""
