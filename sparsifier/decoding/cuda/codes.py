"""Lays quantised weights out for the compiled products that vote: codes in the order of outputs, scales by tiles."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.decoding.cuda.variant import LANES, Tile
from resting.sparsifier.decoding.cuda_quantised_layout import check, joined, turned, unsigned
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.weight import QuantisedWeight

SHARED_BYTES = 47 << 10
"""What a program may keep in shared memory without asking for more."""
LANE_BYTES = {8: (8, 16), 4: (4, 8, 16)}
"""Bytes of a row that a lane may read at once, by bits of a code."""


class Codes(NamedTuple):
    """Holds the codes of layers side by side, each filled up to whole tiles; stands where a weight [out, in] does.

    Attributes
    ----------
    words : int32 Tensor [inputs, words]
    scales : int16 Tensor [tiles, inputs, scales of a tile]
        float16 or bfloat16.
    shape : tuple of int
        Outputs and inputs.
    dtype : torch.dtype
        Of the activations.
    bits, lane_bytes, half_scales : int
        `half_scales` has a bit for every layer whose scales are float16.
    typical : float
        Root mean square of a sum, where inputs have a mean square of 1.
    """

    words: Tensor
    scales: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    lane_bytes: int
    half_scales: int
    typical: float

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def tile(self) -> int:
        """Counts the outputs of a program."""
        return LANES * self.lane_bytes * 8 // self.bits

    @property
    def stride(self) -> int:
        """Counts the lanes' parts of a row."""
        return self.words.shape[1] * 4 // self.lane_bytes

    def fits(self, tile: Tile) -> bool:
        """Tells whether a program's sums and lists have room in shared memory, and lists are whole batches."""
        lists = tile.inputs * 4 * (1 + self.scales.shape[2])
        return (
            tile.warps * (lists + self.tile * 4) + 512 <= SHARED_BYTES
            and tile.inputs % tile.loads == 0
            and tile.loads % 4 == 0
        )


def side_by_side(weights: list[QuantisedWeight], dtype: torch.dtype, lane_bytes: int) -> Codes:
    """Lays out layers of one format that read one input.

    Raises
    ------
    SparsifierError
        If no kernel takes the format, the dtype or the bytes of a lane.
    """
    first = weights[0]
    check(first.format)
    bits = first.format.bits
    if dtype not in (torch.bfloat16, torch.float16):
        raise SparsifierError(f"compiled kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    if lane_bytes not in LANE_BYTES[bits]:
        raise SparsifierError(f"a lane reads {LANE_BYTES[bits]} bytes of codes of {bits} bits, not {lane_bytes}")
    if any(w.format != first.format or w.inputs != first.inputs for w in weights):
        raise SparsifierError("layers that share a launch have one format and one input")
    tile = LANES * lane_bytes * 8 // bits
    unit = gcd(first.format.group, tile)
    words, scales = [], []
    for weight in weights:
        extra = -weight.outputs % tile
        codes = unsigned(F.pad(weight.codes, (0, extra)), bits).view(weight.inputs, -1, 32 // bits)
        packed = joined(codes, bits)
        words.append(turned(packed) if bits == 4 else packed)
        of = weight.scales.repeat_interleave(weight.format.group // unit, 1)
        of = F.pad(of, (0, (weight.outputs + extra) // unit - of.shape[1]))
        scales.append(of.view(torch.int16).view(weight.inputs, -1, tile // unit).transpose(0, 1))
    total = sum(weight.outputs for weight in weights)
    squares = sum(weight.outputs * _typical(weight) ** 2 for weight in weights)
    return Codes(
        torch.cat(words, 1).contiguous(),
        torch.cat(scales).contiguous(),
        (total, first.inputs),
        dtype,
        bits,
        lane_bytes,
        sum((weight.scales.dtype == torch.float16) << i for i, weight in enumerate(weights)),
        (squares / total) ** 0.5,
    )


def _typical(weight: QuantisedWeight) -> float:
    squares = weight.codes.float().square().view(weight.inputs, -1, weight.format.group).mean(2)
    return float((squares * weight.scales.float().square()).mean(1).sum().double().sqrt())
