"""Launches the products of quantised weights that ``quantised.cu`` computes by tensor cores."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import NamedTuple

import torch

from resting.sparsifier.decoding.cuda import compiled
from resting.sparsifier.decoding.cuda.variant import PARTS

OLDEST = (9, 0)
"""The first compute capability whose programs read one another's memory in clusters."""
LANES = 32
MIXED = 2
SHARED_BYTES = 47 << 10
"""What a program may keep in shared memory without asking for more."""
POINTERS = ("x", "codes", "scales", "cutoff", "shift", "gain", "start", "more", "squares", "residual", "y", "y_squares")


class Launch(NamedTuple):
    """Says how a product is divided: a cluster of `programs` shares a tile, each of their `warps` has a part of it."""

    warps: int
    programs: int
    """1 to 8."""
    loads: int
    """Eight rows each that a warp asks for at once; twice as many are under way."""

    def inputs(self, inputs: int) -> int:
        """Counts the inputs of a warp, whole votes."""
        return -(-inputs // (self.warps * self.programs * LANES)) * LANES

    def fits(self, inputs: int, tile: int) -> bool:
        """Tells whether lists of `inputs` and sums of a tile have room in shared memory."""
        lists = self.warps * self.inputs(inputs) * 8
        return lists + (self.warps + 1) * tile * 4 <= SHARED_BYTES and tile % self.programs == 0


LAUNCHES = [
    *(Launch(8, 8, 1), Launch(8, 8, 2), Launch(4, 8, 2), Launch(16, 8, 1), Launch(16, 8, 2)),
    *(Launch(8, 4, 1), Launch(8, 4, 2), Launch(4, 4, 2)),
]
"""As they are tried: few, since each is compiled."""


class QuantisedArguments(ctypes.Structure):
    """Mirrors `Arguments` of ``quantised.cu``, byte for byte."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "tiles", "squares_count")),
        ("begins", ctypes.c_int * 2),
        ("first_tiles", ctypes.c_int * 2),
        ("half_scales", ctypes.c_int),
    )


@dataclass(frozen=True)
class QuantisedVariant:
    """Describes one compiled kernel; the names of its fields, in capitals, are macros in the source."""

    bits: int
    scales: int
    """Of a row in a tile: 1, 2, 4 or 8."""
    warps: int
    cluster: int
    loads: int
    per: int
    half: bool = False
    """float16, else bfloat16."""
    half_scales: int = 1
    """0 where scales are bfloat16, 1 where they are float16, `MIXED` where layers differ."""
    layers: int = 1
    reads_all: bool = False
    shifted: bool = False
    normed: bool = False
    gain_float: bool = False
    rounds_first: bool = True
    activation: int = 0
    started: bool = False
    more: bool = False
    added: bool = False
    wide: bool = False
    """The result is in float32."""
    early: bool = False
    """Lets the next launch begin before waiting for the one before."""
    chained: bool = True
    arguments_size: int = ctypes.sizeof(QuantisedArguments)
    kernel = "quantised_columns"

    @property
    def source_text(self) -> str:
        """Gives the source, in CUDA C++."""
        folder = files("resting.sparsifier.decoding.cuda")
        return "\n".join((folder / name).read_text(encoding="utf-8") for name in PARTS[self.kernel])

    @property
    def defines(self) -> list[str]:
        """Gives the macros, as options of the compiler."""
        return [f"-D{f.name.upper()}={int(getattr(self, f.name))}" for f in fields(self)]


def missing(device: torch.device) -> str | None:
    """Says in one sentence why `device` does not run this kernel; None where it does."""
    reason = compiled.missing(device)
    if reason is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "compiled products of quantised weights need compute capability 9.0 or later"
    return reason
