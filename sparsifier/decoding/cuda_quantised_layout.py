"""Lays the codes of quantised weights out for GPU kernels, and refuses what these do not take.

Codes become unsigned (a code of 4 bits 0 to 15, one of 8 bits 1 to 255) and stand in words of 32 bits. Kernels make
numbers of them by bit operations alone: four bits, put into the mantissa of 16.0, read as 16 plus what they hold.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.weight import QuantisedWeight

BITS = (4, 8)
"""Bits of a code that there are GPU kernels for."""
UNIT = 32
"""Outputs that must share a scale: those of one step of a tensor core."""
WORDS = 32
"""Words of a tile's row, read by eight threads at once: 128 bytes."""


class Packed(NamedTuple):
    """Holds the codes of one matrix as a kernel reads them.

    Attributes
    ----------
    codes : int32 Tensor [inputs, tiles * WORDS]
    scales : float16 or bfloat16 Tensor [inputs, tiles * scales of a tile]
        Of every tile's `unit` outputs in turn; 0 beyond the last output.
    bits, unit : int
    """

    codes: Tensor
    scales: Tensor
    bits: int
    unit: int

    @property
    def tile(self) -> int:
        """Counts the outputs of a tile."""
        return WORDS * 32 // self.bits


def check(format: Format) -> None:
    """Refuses a format that no GPU kernel takes.

    Raises
    ------
    SparsifierError
    """
    name, group = format.name, format.group
    if format.bits not in BITS:
        raise SparsifierError(f"GPU kernels take codes of 4 and 8 bits, not {name}")
    if format.zero:
        raise SparsifierError(f"GPU kernels take codes that are symmetric around 0, not {name}")
    if group % UNIT:
        raise SparsifierError(f"GPU kernels take groups of a multiple of {UNIT} outputs, not {group} as in {name}")


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Moves codes so that 0 is the middle of what `bits` hold, as int32."""
    return codes.to(torch.int32) + (1 << (bits - 1))


def in_fragments(weight: QuantisedWeight) -> Packed:
    """Lays codes out for tensor cores: each thread's 16 bytes are what it holds of a matrix product's left side.

    A tile has 32 words in a row, four of each of eight threads. The halves of a word hold even and odd outputs. Every
    word is turned left by three bits, so that its first four bits already lie where a mantissa's do.

    Raises
    ------
    SparsifierError
        As `check`.
    """
    check(weight.format)
    bits, tile = weight.format.bits, WORDS * 32 // weight.format.bits
    unit = gcd(weight.format.group, tile)
    inputs, outputs = weight.codes.shape
    extra = -outputs % tile
    codes = unsigned(F.pad(weight.codes, (0, extra)), bits)
    scales = weight.scales.repeat_interleave(weight.format.group // unit, 1)
    scales = F.pad(scales, (0, (outputs + extra) // unit - scales.shape[1]))
    if bits == 4:  # outputs of a tile: word, plane, thread, row, half
        parts = codes.view(inputs, -1, 4, 2, 8, 2, 2).permute(0, 1, 4, 2, 6, 5, 3)
    else:  # word, thread, row, half
        parts = codes.view(inputs, -1, 4, 8, 2, 2).permute(0, 1, 3, 2, 5, 4)
    return Packed(turned(joined(parts.reshape(inputs, -1, 32 // bits), bits)), scales.contiguous(), bits, unit)


def in_planes(weight: QuantisedWeight) -> Packed:
    """Lays codes out so that the parts of a word belong to outputs far apart, a tile's `WORDS` from one another.

    Raises
    ------
    SparsifierError
        As `check`.
    """
    check(weight.format)
    bits, tile = weight.format.bits, WORDS * 32 // weight.format.bits
    inputs, outputs = weight.codes.shape
    extra = -outputs % tile
    codes = unsigned(F.pad(weight.codes, (0, extra)), bits)
    scales = weight.scales.repeat_interleave(weight.format.group // WORDS, 1)
    scales = F.pad(scales, (0, (outputs + extra) // WORDS - scales.shape[1]))
    parts = codes.view(inputs, -1, 32 // bits, WORDS).transpose(2, 3)
    return Packed(joined(parts.reshape(inputs, -1, 32 // bits), bits), scales.contiguous(), bits, WORDS)


def by_outputs(weight: QuantisedWeight) -> tuple[Tensor, Tensor]:
    """Lays codes out by outputs, for products of which single outputs rest, each a run of words.

    Returns
    -------
    int32 Tensor [outputs, words]
        Of every 32 words' inputs, the parts of a word are 32 inputs apart.
    float16 or bfloat16 Tensor [groups, inputs]

    Raises
    ------
    SparsifierError
        As `check`.
    """
    check(weight.format)
    bits = weight.format.bits
    codes = F.pad(weight.codes.t(), (0, -weight.inputs % (WORDS * 32 // bits)))
    parts = unsigned(codes, bits).view(weight.outputs, -1, 32 // bits, WORDS).transpose(2, 3)
    return joined(parts.reshape(weight.outputs, -1, 32 // bits), bits), weight.scales.t().contiguous()


def joined(parts: Tensor, bits: int) -> Tensor:
    """Joins the parts [rows, words, parts] of words, the first part lowest."""
    words = torch.zeros(parts.shape[:2], dtype=torch.int64, device=parts.device)
    for i in range(parts.shape[2]):
        words |= parts[:, :, i].to(torch.int64) << (bits * i)
    return _as_int32(words)


def turned(words: Tensor) -> Tensor:
    """Turns words left by three bits."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    return _as_int32(((wide << 3) | (wide >> 29)) & 0xFFFFFFFF)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
