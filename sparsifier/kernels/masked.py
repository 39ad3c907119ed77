"""The definition: the masked forward, in plain torch, for any batch and sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifier.rule import Rule, Vector


def masked(x: Tensor, rule: Rule) -> Tensor:
    """`kept_input` of `x` under a rule, whatever device and dtype its vectors have."""
    return kept_input(x, *(v.to(x) if isinstance(v, Tensor) else v for v in (rule.cutoff(x.dtype), rule.shift)))


def kept_input(x: Tensor, cutoff: Vector, shift: Vector = 0.0) -> Tensor:
    """``(x - shift) * (|x - shift| > cutoff)``: what is left of an input when its small entries rest.

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
    if isinstance(shift, Tensor) or shift != 0.0:
        x = x - shift
    if isinstance(cutoff, float):
        return F.hardshrink(x, cutoff)  # one pass over memory, where abs, compare and multiply are three
    return torch.where(x.abs() <= cutoff, 0.0, x)
