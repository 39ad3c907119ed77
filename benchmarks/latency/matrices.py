"""One matrix at a time: the kernels against the best dense product, on weights from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import timing
from resting.benchmarks.latency.gpu.compiling import OVERLAPPING, TUNED, overlaps
from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda import products
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import PLAIN, Tile
from resting.sparsifier.decoding.products import columns, rows
from resting.sparsifier.decoding.step.graph import captured
from resting.sparsifier.decoding.timing import COLD_BYTES

ROUNDS = 25
GRAPH = 24
"""Products in a CUDA graph, at least."""
Calls = dict[str, Callable[[int], object]]
"""Alternatives, each given the number of the weights that it is to take."""


@dataclass(frozen=True)
class Matrix:
    """Holds the shape of a linear layer."""

    inputs: int
    outputs: int

    @classmethod
    def parse(cls, text: str) -> Matrix:
        """Read ``"4096x14336"``, inputs first."""
        try:
            inputs, outputs = (int(part) for part in text.split("x"))
        except ValueError:
            raise SuiteError(f"matrix {text!r}: must be INPUTSxOUTPUTS, such as 4096x14336") from None
        if min(inputs, outputs) < 16:
            raise SuiteError(f"matrix {text!r}: must be at least 16x16")
        return cls(inputs, outputs)

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}"


def measure(
    matrix: Matrix, dtype: torch.dtype, sparsities: list[float], threads: int, device: str = "cpu"
) -> tuple[list[dict[str, Any]], timing.Times]:
    """Time the dense products, the column kernel at every sparsity, and the row kernel at the middle one.

    Returns
    -------
    list of dict
        One row per alternative: times in seconds, the ratio to the best dense product (``speedup``) and its share of
        1 / (1 - s), and the ratio to the best one that is not this kernel with nothing at rest (``speedup_other``).
    dict of str to list of float
        Raw seconds.
    """
    size = matrix.inputs * matrix.outputs * dtype.itemsize
    copies = max(4, min(512, COLD_BYTES[torch.device(device).type] // size))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, matrix.inputs, generator=generator).to(device, dtype)
    dense = [
        torch.empty(matrix.outputs, matrix.inputs, dtype=dtype, device=device).normal_(0, 0.02) for _ in range(copies)
    ]
    major = [input_major(w) for w in dense]
    cutoffs = {s: float(x.abs().float().quantile(s)) if s else 0.0 for s in sparsities}
    calls: Calls = {
        "linear": lambda i: F.linear(x, dense[i % copies]),
        "linear, input-major": lambda i: F.linear(x, major[i % copies]),
    }
    for s, cutoff in {0.0: 0.0, **cutoffs}.items():
        products = [columns(w, Rule(threshold=cutoff), threads=threads, rests=s) for w in major]
        calls[f"columns {s:g}"] = partial(_one_of, products, (x,))
    middle = sparsities[len(sparsities) // 2]
    gate = torch.randn(1, 1, matrix.outputs, generator=generator).to(device, dtype)
    rule = Rule(threshold=float(gate.abs().float().quantile(middle)))
    skips = [rows(w, rule, threads=threads) for w in dense]
    calls[f"rows {middle:g}"] = partial(_one_of, skips, (x, gate))
    with torch.inference_mode():
        if device == "cpu":
            times = timing.interleaved(calls, max(ROUNDS, copies))
        else:
            times = _replayed(calls | _on_gpu(x, dense, gate) | _sums(x, major, cutoffs), copies)
    return _rows(matrix, dtype, size, times), times


def _on_gpu(x: torch.Tensor, dense: list[torch.Tensor], gate: torch.Tensor) -> Calls:
    """Make more dense products: torch's own compiled ones, and a plain one in Triton, row by row."""
    torch.compiler.reset()  # code is kept for few shapes, and then no more is compiled
    plain: list[Any] = [rows(w, Rule()) for w in dense]
    kinds = {"linear, compiled": [TUNED]}
    if overlaps(x.device):
        kinds["linear, overlapping"] = [TUNED, OVERLAPPING]
    compiled: Calls = {name: partial(_compiled(options), x, dense) for name, options in kinds.items()}
    return compiled | {"linear, rows": partial(_one_of, plain, (x, gate))}


def _sums(x: torch.Tensor, major: list[torch.Tensor], cutoffs: dict[float, float]) -> Calls:
    """Make the products of a block's chain: compiled kernels that leave sums to who reads them next.

    Each makes zeros of the place that the next adds to, as a block's launches do. Nothing where kernels are not
    compiled, or not for this shape.
    """
    if missing(x.device) is not None:
        return {}
    from resting.sparsifier.decoding.cuda import choice

    outputs, inputs = major[0].shape
    calls: Calls = {}
    try:
        products.check_shapes(major[0], [outputs], Input())
    except SparsifierError:
        return calls
    places = [Sums(outputs, 1.0, x.device) for _ in range(2)]
    for s, cutoff in cutoffs.items():
        if s:
            tile = Tile(*choice.fastest((PLAIN, inputs, outputs, True), x, s)[0])
            layers = [(outputs, Rule(threshold=cutoff))]
            chain = [
                products.VotingColumns(w, layers, place=places[i % 2], zeros=places[1 - i % 2], tile=tile)
                for i, w in enumerate(major[: len(major) // 2 * 2])  # the last one makes zeros for the first
            ]
            calls[f"sums {s:g}"] = partial(_one_of, chain, (x,))
    return calls


def _compiled(options: list[str]) -> Callable[[torch.Tensor, list[torch.Tensor], int], object]:
    def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)

    product = torch.compile(linear, dynamic=False, options=dict.fromkeys(options, True))
    return lambda x, dense, i: product(x, dense[i % len(dense)])


def _replayed(calls: Calls, copies: int) -> timing.Times:
    """Time one call inside a CUDA graph that goes through all weights, again where they are few."""
    graphs: Calls = {}
    count = copies * -(-GRAPH // copies)  # the start of a graph is not a part of a product
    for name, call in calls.items():
        replay = captured(partial(_all, call, count), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        graphs[name] = partial(_again, replay)
    times = timing.interleaved(graphs, ROUNDS, timing.on_gpu)
    return {name: [seconds / count for seconds in values] for name, values in times.items()}


def _all(call: Callable[[int], object], copies: int) -> None:
    for i in range(copies):
        call(i)


def _again(replay: Callable[[], object], _: int) -> object:
    return replay()


def _one_of(products: Sequence[Any], arguments: tuple[torch.Tensor, ...], index: int) -> object:
    return products[index % len(products)](*arguments)


def _rows(matrix: Matrix, dtype: torch.dtype, size: int, times: timing.Times) -> list[dict[str, Any]]:
    p20 = {name: timing.p20(values) for name, values in times.items()}
    dense = {name: t for name, t in p20.items() if "linear" in name} | {"columns 0": p20["columns 0"]}
    best = min(dense, key=lambda name: dense[name])
    other = min((name for name in dense if "linear" in name), key=lambda name: dense[name])
    out = []
    for name, seconds in p20.items():
        kernel, _, at = name.partition(" ")
        sparsity = float(at) if kernel in ("columns", "rows", "sums") else 0.0
        speedup = dense[best] / seconds
        out.append(
            {
                "matrix": str(matrix),
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": name if sparsity == 0.0 and "linear" in name else kernel,
                "sparsity": sparsity,
                "seconds": seconds,
                "best_dense": best,
                "speedup": speedup,
                "best_other": other,
                "speedup_other": dense[other] / seconds,
                "over_linear": dense["linear"] / seconds,
                "share": speedup * (1.0 - sparsity),
                "bandwidth": size * (1.0 - sparsity) / seconds,
            }
        )
    return out
