"""Measures ratios of times in one session: the only thing about speed that two machines can agree on.

The micro-benchmarks (`benchmarks/micro/bench_kernels.py`) time the products that are built here, so that there is one
definition of what a kernel is given. `measure` times three of them in turn, in seconds; `read` takes the same ratios
from the JSON of a run of the micro-benchmarks. Both compare first quartiles: of the statistics in that JSON it is the
one that is steady and hardly touched by a neighbour on the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.latency import timing
from resting.sparsifier import Rule
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.products import columns, rows
from resting.sparsifier.decoding.timing import COLD_BYTES

QUANTILE, ROUNDS = 0.25, 24
INPUTS = 16
SHAPE = (2048, 2048, torch.float32)
"""What the guard takes its ratios of: inputs, outputs and dtype."""
RATIOS = {"kernel 0.9 over 0": ("columns 0", "columns 0.9"), "kernel 0.9 over linear": ("linear", "columns 0.9")}
"""Which product's time is divided by which."""


@dataclass
class Layer:
    """Holds random weights of one shape, in as many copies as no cache holds, and builds products on them.

    Inputs change from one round of the copies to the next: a tenth of all weights, the same one each time, would be
    found in a large cache.

    Attributes
    ----------
    inputs, outputs : int
    dtype : torch.dtype
    weights, major : list of Tensor [outputs, inputs]
        Output-major, as linear layers have them, and input-major.
    x : Tensor [16, 1, 1, inputs]
    gate : Tensor [16, 1, 1, outputs]
    """

    inputs: int
    outputs: int
    dtype: torch.dtype
    weights: list[Tensor] = field(init=False, repr=False)
    major: list[Tensor] = field(init=False, repr=False)
    x: Tensor = field(init=False, repr=False)
    gate: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = self.inputs, self.outputs
        self.x, self.gate = (torch.randn(INPUTS, 1, 1, n, generator=generator).to(self.dtype) for n in widths)
        shape, copies = (self.outputs, self.inputs), max(4, COLD_BYTES["cpu"] // self.bytes)
        self.weights = [
            torch.empty(shape, dtype=self.dtype).uniform_(-1, 1, generator=generator) for _ in range(copies)
        ]
        self.major = [input_major(w) for w in self.weights]

    @property
    def bytes(self) -> int:
        """Bytes of the weights that a dense product reads."""
        return self.inputs * self.outputs * self.dtype.itemsize

    def product(self, name: str, kernel: Any = columns) -> Callable[[int], object]:
        """Build a product, called with the number of the weights that it is to take; all run on one thread.

        Parameters
        ----------
        name : str
            ``"linear"`` (the library's dense product), ``"columns 0.5"`` (inputs at rest) or ``"rows 0.5"`` (rows).
        kernel : callable
            What builds the products of ``"columns"``.
        """
        kind, sparsity = _parsed(name)
        rule, copies = Rule(threshold=_cutoff(self._masked(kind), sparsity)), len(self.weights)
        if kind == "linear":
            return lambda i: F.linear(self.x[i // copies % INPUTS], self.weights[i % copies])
        if kind == "columns":
            products = [kernel(w, rule, threads=1) for w in self.major]
            return lambda i: products[i % copies](self.x[i // copies % INPUTS])
        gated = [rows(w, rule, threads=1) for w in self.weights]
        return lambda i: gated[i % copies](self.x[i // copies % INPUTS], self.gate[i // copies % INPUTS])

    def bytes_read(self, name: str) -> int:
        """Count the bytes of weights that a product reads, on the mean over inputs."""
        kind, sparsity = _parsed(name)
        if kind == "linear":
            return self.bytes
        x = self._masked(kind)
        cutoff = Rule(threshold=_cutoff(x, sparsity)).cutoff(self.dtype)
        return self.bytes * int((x.abs() > cutoff).sum()) // x.numel()

    def _masked(self, kind: str) -> Tensor:
        return self.gate if kind == "rows" else self.x


def label(inputs: int, outputs: int, dtype: torch.dtype) -> str:
    """Name a shape as the groups of the micro-benchmarks do."""
    return f"{inputs}x{outputs} {str(dtype).removeprefix('torch.')}"


def measure(layer: Layer | None = None, kernel: Any = columns) -> dict[str, float]:
    """Measure how much faster the column kernel is with nine tenths at rest than with none, and than the library.

    Parameters
    ----------
    layer : Layer, optional
        Weights that are there already.
    kernel : callable
        `columns`, or what is to be caught.
    """
    layer = layer or Layer(*SHAPE)
    with one_thread(), torch.inference_mode():
        calls = {name: layer.product(name, kernel) for pair in RATIOS.values() for name in pair}
        times = timing.interleaved(calls, ROUNDS)
    return _ratios({name: timing.quantile(seconds, QUANTILE) for name, seconds in times.items()})


def read(path: Path) -> dict[str, float]:
    """Read the same ratios from the JSON of a run of the micro-benchmarks.

    Raises
    ------
    BenchmarkError
        If the file cannot be read, or lacks one of the products.
    """
    group = label(*SHAPE)
    try:
        cases = [case for case in json.loads(path.read_text())["benchmarks"] if case["group"] == group]
        return _ratios({case["extra_info"]["product"]: float(case["stats"]["q1"]) for case in cases})
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise BenchmarkError(
            f"{path} lacks times of the products of {group} ({error}); `tox -e micro` writes such a file"
        ) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as the kernels do that are timed here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {name: seconds[slow] / seconds[quick] for name, (slow, quick) in RATIOS.items()}


def _parsed(name: str) -> tuple[str, float]:
    kind, _, sparsity = name.partition(" ")
    return kind, float(sparsity or 0)


def _cutoff(x: Tensor, sparsity: float) -> float:
    return float(x.abs().float().quantile(sparsity)) if sparsity else 0.0
