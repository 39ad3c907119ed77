"""Registers the functions that say which channels of a token are kept, by name.

A function is named in `Rule.mask`, and saved by its name: a package that registers one must be imported before a plan
with it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resting.sparsifier.errors import PlanError

THRESHOLD = "threshold"
TINY = 1e-30
"""Keeps a token of zeros from dividing by zero."""


@dataclass(frozen=True)
class MaskFunction:
    r"""Says which channels of a token are kept, by a number that each of them has among the others of its token.

    .. math:: level = f(|scale \cdot (x - shift)|), \qquad keep = level > threshold

    Attributes
    ----------
    name : str
        As in `Rule.mask`.
    level : callable
        From the scores of tokens, a Tensor [..., in] of at least fp32, to their levels [..., in]. It looks at one token
        at a time, and gives no NaN for a token of zeros. A channel whose level is NaN is kept.
    least, most : float
        What a threshold may be.
    neutral : float
        The threshold at which nothing rests.
    falls : bool
        Keep where ``level < threshold`` instead, so that a larger threshold keeps more.
    inclusive : bool
        Keep at the threshold as well.
    """

    name: str
    level: Callable[[Tensor], Tensor]
    least: float = 0.0
    most: float = math.inf
    neutral: float = 0.0
    falls: bool = False
    inclusive: bool = False

    def rests(self, score: Tensor, threshold: float) -> Tensor:
        """Tells of every channel whether it rests, from its `score` [..., in]."""
        level = self.level(score)
        if self.falls:
            return level > threshold if self.inclusive else level >= threshold
        return level < threshold if self.inclusive else level <= threshold

    def check(self, threshold: float) -> None:
        """Refuses a threshold that is none of this function.

        Raises
        ------
        PlanError
        """
        if not self.least <= threshold <= self.most:
            raise PlanError(
                f"the threshold of mask {self.name!r} must be in [{self.least:g}, {self.most:g}], got {threshold:g}"
            )


def share_before(score: Tensor) -> Tensor:
    """Computes the share of a token's L1 norm that lies in its larger entries, of equal ones in those before."""
    values, order = score.sort(dim=-1, descending=True, stable=True)
    total = values.cumsum(-1)
    before = (total - values) / total[..., -1:].clamp_min(TINY)
    return torch.empty_like(before).scatter_(-1, order, before)


def share_of_largest(score: Tensor) -> Tensor:
    """Divides by the largest entry of the token."""
    return score / score.amax(-1, keepdim=True).clamp_min(TINY)


def deviations(score: Tensor) -> Tensor:
    """Counts standard deviations above the token's mean, both over its channels (divided by their number)."""
    mean = score.mean(-1, keepdim=True)
    spread = score.std(-1, correction=0, keepdim=True)
    # Where all are alike, the deviation is rounding.
    return (score - mean) / torch.maximum(spread, 1e-6 * mean).clamp_min(TINY)


_FUNCTIONS: dict[str, MaskFunction] = {}


def register(function: MaskFunction) -> MaskFunction:
    """Makes `function` known by its name.

    Raises
    ------
    PlanError
        If another one has the name.
    """
    known = _FUNCTIONS.setdefault(function.name, function)
    if known != function:
        raise PlanError(f"there is a mask function {function.name!r} already; give yours another name")
    return function


def mask_function(name: str) -> MaskFunction:
    """Gives the function that is registered as `name`.

    Raises
    ------
    PlanError
        If none is.
    """
    if name not in _FUNCTIONS:
        raise PlanError(f"mask must be one of {', '.join(_FUNCTIONS)}, got {name!r}")
    return _FUNCTIONS[name]


register(MaskFunction(THRESHOLD, lambda score: score))
register(MaskFunction("top-p", share_before, most=1.0, neutral=1.0, falls=True))
register(MaskFunction("max-p", share_of_largest, most=1.0, inclusive=True))
register(MaskFunction("statistical", deviations, least=-math.inf, neutral=-math.inf))
