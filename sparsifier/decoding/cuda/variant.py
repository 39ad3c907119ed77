"""Says what a kernel is compiled for: the choices that are made before it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from typing import NamedTuple, Protocol

PLAIN, NORMED, GATED = range(3)
"""What a product does with its input first: nothing, RMSNorm, or an activated gate times what it opens."""
STORED, FIXED, FLOATS = range(3)
"""What an input is read from: numbers in the model's dtype, sums in fixed point, or sums in float32."""
PARTS = {
    "columns": ("machine.cu", "numbers.cu", "activation.cu", "inputs.cu", "codes.cu", "columns.cu"),
    "rows": ("machine.cu", "numbers.cu", "activation.cu", "inputs.cu", "rows.cu"),
    "begin": ("machine.cu", "numbers.cu", "stream.cu"),
    "finish": ("machine.cu", "numbers.cu", "stream.cu"),
    "quantised_columns": ("machine.cu", "quantised_machine.cu", "activation.cu", "quantised.cu"),
}
"""Files that make up each kernel, one after another."""
LANES = 32
COLUMNS = 256
"""Outputs of a program: 32 lanes read 16 bytes each."""


class Tile(NamedTuple):
    """Says how a product is divided: a program has `warps`, each with `inputs` x 256 weights."""

    warps: int
    inputs: int
    """8, 16 or 32."""
    loads: int
    """Rows that a warp asks for at once."""

    def programs(self, inputs: int) -> int:
        """Counts the programs that add to one output."""
        return -(-inputs // (self.warps * self.inputs))


class Compilable(Protocol):
    """Describes what is compiled and launched; it can be hashed."""

    @property
    def kernel(self) -> str: ...

    @property
    def warps(self) -> int: ...

    @property
    def chained(self) -> bool: ...

    @property
    def source_text(self) -> str: ...

    @property
    def defines(self) -> list[str]: ...


@dataclass(frozen=True)
class Variant:
    """Describes one compiled kernel; the names of its fields, in capitals, are macros in the source."""

    kernel: str
    arguments_size: int
    half: bool = False
    """float16, else bfloat16."""
    bits: int = 16
    """Of a weight: 8 and 4 are codes."""
    lane_bytes: int = 16
    """Bytes of a row that a lane reads at once."""
    scales: int = 1
    """Of an input in a tile, of codes: 1, 2, 4, ..."""
    warps: int = 8
    per: int = 16
    loads: int = 8
    layers: int = 1
    source: int = STORED
    gate_source: int = STORED
    input: int = PLAIN
    inputs: int = 0
    """0 where the kernel need not know it."""
    activation: int = 0
    rounds_first: bool = True
    rounds: bool = True
    """Whether sums that are an input are rounded to the model's dtype."""
    shifted: bool = False
    reads_all: bool = False
    resting: bool = False
    """Reads the weights of what rests instead."""
    ranked: bool = False
    started: bool = False
    float_sums: bool = False
    finished: bool = False
    """The last program of a tile writes numbers in the model's dtype, and leaves zeros in the sums."""
    wide_out: bool = False
    """Those numbers are float32."""
    chained: bool = True
    """Begins while the launch before it ends."""
    early: bool = False
    """Lets the next launch begin before waiting for the one before."""

    @property
    def source_text(self) -> str:
        """Gives the source, in CUDA C++."""
        folder = files("resting.sparsifier.decoding.cuda")
        return "\n".join((folder / name).read_text(encoding="utf-8") for name in PARTS[self.kernel])

    @property
    def defines(self) -> list[str]:
        """Gives the macros, as options of the compiler."""
        given = ((f.name.upper(), getattr(self, f.name)) for f in fields(self) if f.name != "kernel")
        return [f"-D{name}={int(value)}" for name, value in given]
