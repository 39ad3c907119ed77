"""Defines the masked forward, in plain torch, for any batch and sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.mask_functions import THRESHOLD, MaskFunction, mask_function
from resting.sparsifier.rule import Rule, Vector


def masked(x: Tensor, rule: Rule) -> Tensor:
    """Computes the kept input of `x` [..., in] under a rule, whatever device and dtype its vectors have."""
    return Masking(rule)(x)


class Masking:
    """Applies the mask of a rule, and holds its vectors ready in the dtypes and on the devices it was called with."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._by_score = rule.topk is not None or rule.mask != THRESHOLD
        self._ready: dict[tuple[torch.dtype, torch.device], tuple[Vector, Vector]] = {}

    @property
    def is_by_cutoff(self) -> bool:
        """Tells whether every entry is compared with a number of its own channel, and nothing else is done."""
        shifts = isinstance(self.rule.shift, Tensor) or self.rule.shift == 0.0
        return type(self.rule) is Rule and not self._by_score and not self.rule.rescale and shifts

    def vectors(self, x: Tensor) -> tuple[Vector, Vector]:
        """Gives cutoff (of a mask by scores: the scale) and shift, as `x` needs them."""
        rule, key = self.rule, (x.dtype, x.device)
        if key not in self._ready:
            # A function compares scores, a threshold compares inputs with threshold / scale.
            first = rule.scale if self._by_score else rule.cutoff(x.dtype)
            self._ready[key] = (_on(first, x, torch.float32 if self._by_score else x.dtype), _on(rule.shift, x))
        return self._ready[key]

    def __call__(self, x: Tensor) -> Tensor:
        """Computes ``(x - shift) * keep`` of `x` [..., in], rescaled where the rule says so."""
        rule = self.rule
        first, shift = self.vectors(x)
        if rule.topk is not None:
            kept = largest(x, rule.topk, first, shift)
        elif self._by_score:
            kept = kept_by(mask_function(rule.mask), x, float(rule.threshold), first, shift)
        else:
            kept = kept_input(x, first, shift)
        return rescaled(kept, _shifted(x, shift)) if rule.rescale and kept is not x else kept


def kept_input(x: Tensor, cutoff: Vector, shift: Vector = 0.0) -> Tensor:
    """Computes ``(x - shift) * (|x - shift| > cutoff)``: what is left of an input when its small entries rest.

    Parameters
    ----------
    x : Tensor [..., in]
    cutoff : float or Tensor [in]
        In the precision of `x` (`Rule.cutoff`).
    shift : float or Tensor [in]

    Returns
    -------
    Tensor [..., in]
        NaN and infinity pass, as they would through a dense layer.
    """
    x = _shifted(x, shift)
    if isinstance(cutoff, float):
        return F.hardshrink(x, cutoff)  # one pass over memory, where abs, compare and multiply are three
    return torch.where(x.abs() <= cutoff, 0.0, x)


def largest(x: Tensor, count: int, scale: Vector = 1.0, shift: Vector = 0.0) -> Tensor:
    """Keeps ``x - shift`` where it is one of the `count` largest ``|scale (x - shift)|`` of its token, else zero.

    Parameters
    ----------
    x : Tensor [..., in]
    count : int
        At or above `in`, all are kept.
    scale, shift : float or Tensor [in]

    Returns
    -------
    Tensor [..., in]
        Exactly `count` entries are kept, whatever ties there are; NaN and infinity count as largest.
    """
    x = _shifted(x, shift)
    if count >= x.shape[-1]:
        return x
    score = x.abs() if isinstance(scale, float) else x.abs().float() * scale
    kept = score.topk(count, -1, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, kept, x.gather(-1, kept))


def kept_by(function: MaskFunction, x: Tensor, threshold: float, scale: Vector = 1.0, shift: Vector = 0.0) -> Tensor:
    """Keeps ``x - shift`` where `function` does, by the scores ``|scale (x - shift)|`` of its token, else zero.

    Parameters
    ----------
    function : MaskFunction
    x : Tensor [..., in]
    threshold : float
    scale, shift : float or Tensor [in]
    """
    x = _shifted(x, shift)
    if threshold == function.neutral:
        return x
    score = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32)) * scale
    return torch.where(function.rests(score, threshold), 0.0, x)


def rescaled(kept: Tensor, x: Tensor) -> Tensor:
    """Multiplies `kept` by ``sqrt(Var x / Var kept)``, token by token.

    Variances are over all channels, about the mean and divided by their number; where one is 0 or not finite, the token
    stays as it is.

    Parameters
    ----------
    kept, x : Tensor [..., in]
        A masked input, and what it was before.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    of_x, of_kept = (t.to(wide).var(-1, correction=0, keepdim=True) for t in (x, kept))
    fits = (of_x > 0) & (of_kept > 0) & torch.isfinite(of_x) & torch.isfinite(of_kept)
    # The inner `where` keeps a derivative of 0 / 0 out of the one that is taken.
    ratio = torch.where(fits, of_x, 1.0) / torch.where(fits, of_kept, 1.0)
    return kept * ratio.sqrt().to(kept.dtype)


def _shifted(x: Tensor, shift: Vector) -> Tensor:
    return x - shift if isinstance(shift, Tensor) or shift != 0.0 else x


def _on(value: Vector, x: Tensor, dtype: torch.dtype | None = None) -> Vector:
    return value.to(x.device, dtype or x.dtype) if isinstance(value, Tensor) else value
