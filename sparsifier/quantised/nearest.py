"""Rounds weights to the nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.weight import QuantisedWeight, groups_of

_SMALLEST = torch.finfo(torch.float16).smallest_normal


def quantised(weight: Tensor, format: Format) -> QuantisedWeight:
    """Rounds every weight to the nearest code of its group.

    A symmetric group's largest weight has the highest code; with a zero point, the codes span the group's range and 0.
    The scale is rounded to its 16 bits first, and codes are those nearest under the rounded scale.

    Parameters
    ----------
    weight : Tensor of float [outputs, inputs]
        As a linear layer holds it.
    format : Format

    Returns
    -------
    QuantisedWeight

    Raises
    ------
    SparsifierError
        If a group does not divide the outputs, or weights are not finite.
    """
    rows = weight.detach().T.float()
    if not bool(torch.isfinite(rows).all()):
        raise SparsifierError(f"weights that are not finite cannot be stored as {format.name}")
    grouped = rows.reshape(rows.shape[0], groups_of(rows.shape[1], format), format.group)
    scales, zeros = scales_and_zeros(grouped, format)
    codes = nearest(grouped, scales[..., None], None if zeros is None else zeros[..., None], format)
    return QuantisedWeight(format, codes.reshape(rows.shape).contiguous(), scales, zeros)


def scales_and_zeros(grouped: Tensor, format: Format, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Gives the scale of every group [inputs, groups, group], and the zero point where the format has one.

    Scales are stored in `dtype`, or in the one that `stored` chooses.
    """
    if not format.zero:
        return stored(grouped.abs().amax(-1) / format.highest, dtype), None
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = stored((high - low) / (format.highest - format.lowest), dtype)
    zeros = (format.lowest - low / scales.float()).round().clamp(format.lowest, format.highest)
    return scales, zeros.to(torch.int8)


def stored(scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rounds scales to float16, or all of them to bfloat16 where one is beyond float16's normal range.

    A group of zeros alone has scale 1. Where `dtype` is given, scales beyond its range are the nearest in it.
    """
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    if dtype is not None:
        limits = torch.finfo(dtype)
        return scales.clamp(limits.smallest_normal, limits.max).to(dtype)
    fits = bool((scales.amin() >= _SMALLEST) & (scales.amax() <= torch.finfo(torch.float16).max))
    return scales.to(torch.float16 if fits else torch.bfloat16)


def nearest(weights: Tensor, scales: Tensor, zeros: Tensor | None, format: Format) -> Tensor:
    """Gives the codes nearest to `weights`; the other arguments are broadcast to them."""
    codes = (weights / scales.float()).round()
    if zeros is not None:
        codes = codes + zeros.float()
    return codes.clamp(format.lowest, format.highest).to(torch.int8)
