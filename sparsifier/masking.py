"""Defines the masked forward, in plain torch, for any batch and sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.rule import Rule, Vector


def masked(x: Tensor, rule: Rule) -> Tensor:
    """Computes ``(x - shift) * keep`` of `x` [..., in] under a rule, whatever device and dtype its vectors have."""
    return Masking(rule)(x)


class Masking:
    """Applies the mask of a rule, and holds its vectors ready in the dtypes and on the devices it was called with."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._ready: dict[tuple[torch.dtype, torch.device], tuple[Vector, Vector]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Computes ``(x - shift) * keep`` of `x` [..., in]."""
        key = (x.dtype, x.device)
        topk = self.rule.topk
        if key not in self._ready:
            # Top-k compares scores, a threshold compares inputs with threshold / scale.
            first = self.rule.scale if topk is not None else self.rule.cutoff(x.dtype)
            self._ready[key] = (_on(first, x, x.dtype if topk is None else torch.float32), _on(self.rule.shift, x))
        first, shift = self._ready[key]
        return kept_input(x, first, shift) if topk is None else largest(x, topk, first, shift)


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


def _shifted(x: Tensor, shift: Vector) -> Tensor:
    return x - shift if isinstance(shift, Tensor) or shift != 0.0 else x


def _on(value: Vector, x: Tensor, dtype: torch.dtype | None = None) -> Vector:
    return value.to(x.device, dtype or x.dtype) if isinstance(value, Tensor) else value
