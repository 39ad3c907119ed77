"""Tells real tokens from padding, whatever form the attention mask of a forward has."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.errors import SparsifierError


def real_tokens(mask: Any, positions: Tensor | None, batch: int, length: int, past: int, cached: bool) -> Tensor | None:
    """Finds the real tokens of a forward and those before it.

    Parameters
    ----------
    mask : Tensor [batch, past + length], or [batch, 1, length, keys], or dict of str to such a one, optional
        With four dimensions it is what transformers makes of padding and order for a static cache; in a dict, one for
        each kind of layer.
    positions : Tensor [batch, length], optional
    batch, length, past : int
        Of the forward: `length` new tokens after `past` cached ones.
    cached : bool
        Whether there is a cache; its masks may be longer than what was seen.

    Returns
    -------
    Tensor [batch, past + length] of bool or int, or None where all tokens are real

    Raises
    ------
    SparsifierError
        If the mask does not say which tokens are padding.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    seen = past + length
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise _unknown(f"a {type(mask).__name__}" + (f" {list(mask.shape)}" if isinstance(mask, Tensor) else ""))
    wide = mask.shape[-1] >= seen if cached else mask.shape[-1] == seen
    if mask.dim() == 2 and len(mask) == batch and wide:
        return mask[:, :seen]
    if mask.dim() == 4 and cached and mask.shape[:3] == (batch, 1, length) and wide:
        return _seen_by_the_last(mask[:, 0], positions, past)
    raise _unknown(f"{list(mask.shape)} in a forward of {batch} x {length} tokens after {past}")


def _seen_by_the_last(mask: Tensor, positions: Tensor | None, past: int) -> Tensor:
    """Takes the tokens that the last one attends to, where padding and order alone can have hidden the others."""
    visible = mask if not mask.is_floating_point() else mask == 0
    visible = visible.bool()
    seen = past + mask.shape[1]
    real = visible[:, -1, :seen]
    expected = F.pad(real, (0, mask.shape[2] - seen))[:, None].expand_as(visible).tril(past)
    fits = (visible == expected).all(-1)
    # Of a padding token's row transformers makes all or nothing, as the kernel wants it.
    fits |= ~real[:, past:] & (visible.all(-1) | ~visible.any(-1))
    # A sliding window hides tokens as padding does, but they have positions.
    numbered = bool(real.all()) or (positions is not None and bool((positions[:, -1] + 1 == real.sum(1)).all()))
    if not bool(fits.all()) or not numbered:
        raise _unknown("one that hides more than padding and later tokens")
    return real


def _unknown(found: str) -> SparsifierError:
    return SparsifierError(
        f"token policies need an attention mask that tells padding, got {found}; allowed: [batch, past + length], or "
        "what transformers makes of that for a static cache without a sliding window"
    )
