"""Masks an input and counts what is kept in one pass, where a kernel can, else in the plain form."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from resting.sparsifier.masking import Masking
from resting.sparsifier.policy import Selection

SMALLEST = 2**16
"""Entries of an input below which a launch costs more than it saves."""
KNOWN = (torch.float32, torch.bfloat16, torch.float16)


def masked_and_counted(
    masking: Masking, x: Tensor, selection: Selection, counted: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes the kept input of the sparse tokens of `x`, with the dense ones as they were.

    Parameters
    ----------
    masking : Masking
    x : Tensor [batch, length, in], or flattened to [batch * length, in]
    selection : Selection
    counted : bool
        Whether counts are wanted.

    Returns
    -------
    kept : Tensor
        As `x`.
    counts : Tensor [batch, length, 1] of int32, or None
        Entries of every token that are not zero; None where nothing was counted on the way.
    """
    if not _can_fuse(masking, x, selection):
        return selection.restore_dense(masking(x), x), None
    from resting.sparsifier import mask_kernel  # Triton is not everywhere

    batch, length = selection.by_token(x).shape[:2]
    cutoff, shift = masking.vectors(x)
    kept, counts = mask_kernel.kept_and_counted(x, cutoff, shift, length, selection.dense_of(length), counted)
    return kept, None if counts is None else counts.view(batch, length, 1)


def counted_unmasked(x: Tensor, selection: Selection) -> Tensor | None:
    """Counts the entries of an input that no rule masks: [batch, length, 1] of int32; None where no kernel can."""
    if not _is_for_kernel(x, selection):
        return None
    from resting.sparsifier import mask_kernel

    batch, length = selection.by_token(x).shape[:2]
    return mask_kernel.nonzero_counts(x).view(batch, length, 1)


def _can_fuse(masking: Masking, x: Tensor, selection: Selection) -> bool:
    return masking.is_by_cutoff and _is_for_kernel(x, selection) and not (torch.is_grad_enabled() and x.requires_grad)


def _is_for_kernel(x: Tensor, selection: Selection) -> bool:
    return (
        not torch.compiler.is_compiling()
        and is_for_kernels(x)
        and x.dtype in KNOWN
        and x.numel() >= SMALLEST
        and x.is_contiguous()
        and selection.sparse is None
        and selection.shape is not None
        and _kernel_works(x.device)
    )


def is_for_kernels(x: Tensor) -> bool:
    """Tells whether `x` is on a device that kernels are written for."""
    return x.is_cuda


@cache
def _kernel_works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from resting.sparsifier import mask_kernel

    return mask_kernel.works(device)
