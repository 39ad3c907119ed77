"""Lays quantised weights out for the kernels of a CPU: by inputs for columns, by outputs for rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.weight import QuantisedWeight

LANES = 16
"""Numbers that are worked on at once; LLVM divides them where registers hold fewer."""
LINE = 64
"""Bytes of a line of a cache."""
WIDENING = {torch.float16: (1 << 13, 0x38000000), torch.bfloat16: (1 << 16, 0)}
"""What the bits of a scale are multiplied with, and what is added, to give those of the same number in float32."""
_SMALLEST = torch.finfo(torch.float16).smallest_normal


class Laid(NamedTuple):
    """Holds codes and scales as a kernel reads them.

    Attributes
    ----------
    codes : array [rows, bytes]
        int8, or uint8 with two codes of 4 bits, plus 8 each, in a byte. Of columns a row is an input; else an output.
    scales : uint16 array [inputs, groups], of rows [groups, inputs]
        The bits of float16 or bfloat16.
    times, add : uint32
        As `WIDENING` has them.
    """

    codes: np.ndarray
    scales: np.ndarray
    times: np.uint32
    add: np.uint32


def check(form: Format) -> None:
    """Refuses a format that no kernel of a CPU reads.

    Raises
    ------
    SparsifierError
    """
    lanes = LANES * (2 if form.bits == 4 else 1)
    if form.bits not in (4, 8) or form.zero or form.group % lanes:
        raise SparsifierError(
            f"there is no CPU kernel for {form.name}; allowed: symmetric codes of 8 or 4 bits in groups of "
            f"{LANES} (of 4 bits {2 * LANES}) outputs or multiples, as int8, int4-g128"
        )


def by_inputs(held: QuantisedWeight) -> Laid:
    """Copies codes so that those of an input lie in one run.

    Raises
    ------
    SparsifierError
        If there is no kernel for the format, or for a scale.
    """
    check(held.format)
    codes = held.codes.cpu()
    rows = codes.contiguous().numpy() if held.format.bits == 8 else packed(codes, held.format.group)
    return Laid(apart(rows), *_scales(held.scales))


def by_outputs(held: QuantisedWeight, outputs: slice) -> Laid:
    """Copies the codes of some outputs so that those of an output lie in one run; scales are those of all.

    Of 4 bits, a byte holds the code of an input in its low half, and of one half a row further on in its high one.

    Raises
    ------
    SparsifierError
        As `by_inputs`.
    """
    check(held.format)
    codes = held.codes[:, outputs].cpu().T
    if held.format.bits == 4:
        even = F.pad(codes, (0, codes.shape[1] % 2))
        rows = packed(even, even.shape[1])
    else:
        rows = codes.contiguous().numpy()
    return Laid(rows.copy(), *_scales(held.scales.T))  # numpy asks for huge pages


def _scales(scales: Tensor) -> tuple[np.ndarray, np.uint32, np.uint32]:
    if scales.dtype == torch.float16 and bool((scales < _SMALLEST).any()):
        raise SparsifierError("scales of float16 are to be positive and normal")
    times, add = WIDENING[scales.dtype]
    return scales.cpu().contiguous().view(torch.uint16).numpy().copy(), np.uint32(times), np.uint32(add)


def apart(rows: np.ndarray) -> np.ndarray:
    """Copies rows so that they begin an odd number of cache lines apart, with bytes between them that nothing reads.

    Where they begin a power of two apart, the same columns of all rows compete for the same few places in a cache.
    Numpy asks for huge pages, so that not every row begins a page of its own.
    """
    lines = -(-rows.shape[1] // LINE)
    wide = np.zeros((len(rows), (lines + 1 - lines % 2) * LINE), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide


def packed(codes: Tensor, group: int) -> np.ndarray:
    """Packs codes of 4 bits [rows, n] into bytes [rows, n / 2].

    Byte c of a group holds code c, plus 8, in its low half and code ``c + group / 2``, plus 8, in its high one.
    """
    halves = (codes.to(torch.int16) + 8).view(codes.shape[0], -1, 2, group // 2)
    both = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return both.to(torch.uint8).reshape(codes.shape[0], -1).contiguous().numpy()
