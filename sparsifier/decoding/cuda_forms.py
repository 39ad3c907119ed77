"""Chooses between the forms of a product on a GPU, by measurement at the share of inputs that is expected to rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from resting.sparsifier.decoding import cuda_masked, cuda_triton
from resting.sparsifier.decoding.cuda_layouts import CHOSEN, NARROW, Shape, chosen, weights_of
from resting.sparsifier.decoding.cuda_masked import Masked
from resting.sparsifier.decoding.cuda_triton import Launch
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call

USUAL = 0.5
"""Share of inputs at rest that is expected where none is known."""
SHARES = (0.0, 0.25, 0.5, 0.7, 0.9)
"""Shares at which forms are measured: the nearest one decides."""
MASKED = [Masked(32, 128, 1, 2), Masked(32, 128, 1, 4)]
"""Layouts of small programs, as they are tried: those that were fastest for some matrix of an 8B model on an H100.
None adds by atomic operations, whose sums differ between runs."""


def form_for(shape: Shape, rests: float) -> Launch | Masked:
    """Gives the fastest form and layout of a product when about a share `rests` of its inputs rests.

    Raises
    ------
    SparsifierError
        If no tile divides the shape's widths.
    """
    listed = chosen(shape)
    choices = [at for at in MASKED if not any(width % at.outputs for width in shape.widths)]
    if shape.device.type != "cuda" or shape.outputs < NARROW or not choices:
        return listed
    share = min(SHARES, key=lambda at: abs(at - rests))
    name = f"{shape}, {share:g} at rest"
    if name not in FORMS:
        anywhere = shape._replace(device=torch.device("cuda"))
        what = f"{anywhere}, {share:g} at rest, beside {list(listed)}"
        found = remembered("form", what, shape.device, lambda: _fastest(shape, share, listed, choices))
        FORMS[name] = Masked(*found) if found else listed
    form = FORMS[name]
    if isinstance(form, Masked):  # as it is written down with results
        CHOSEN[name] = form
    return form


FORMS: dict[str, Launch | Masked] = {}
"""Holds the forms that are used from now on, by shape and share."""


def _fastest(shape: Shape, share: float, listed: Launch, choices: list[Masked]) -> list[int]:
    """Finds the fastest layout of small programs; nothing where the list of active inputs is faster."""
    timed = _timed(shape, share)
    best = min(choices, key=timed)
    return list(best) if timed(best) < timed(listed) else []


def _timed(shape: Shape, share: float) -> Any:
    device, weights = shape.device, weights_of(shape)
    outputs = weights[0].shape[1]
    x = torch.randn(1, shape.inputs, dtype=shape.dtype, device=device)
    least = x.abs().float().quantile(share).view(1, 1) if share else torch.full((1, 1), -1.0, device=device)
    cutoff = least.expand(1, shape.inputs).contiguous()
    before = None, None, [outputs, outputs], None, None, None, None, None, 0.0, True, 0, None, 1.0
    reads_all = shape.kernel == "dense"

    def time(at: Launch | Masked) -> float:
        if isinstance(at, Masked):
            more: tuple[Any, ...] = least, *before, None, 1, reads_all, list(at), False
            return seconds_per_call([partial(cuda_masked.masked_columns, x, w, *more) for w in weights], device)
        counter = torch.zeros(-(-outputs // at.outputs), dtype=torch.int32, device=device)
        more = cutoff, *before, counter, reads_all, False, list(at), False, False
        return seconds_per_call([partial(cuda_triton.columns, x, w, *more) for w in weights], device)

    return time
