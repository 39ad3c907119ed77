"""One matrix at a time, from codes: the kernels against the best dense product of as many bits, and against plain ones.

Torch's own products of quantised weights are peers: they read as many bytes, with scales of a layout of their own, and
codes at random.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from resting.benchmarks.latency import timing
from resting.benchmarks.latency.matrices import ROUNDS, Calls, Matrix
from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.products import columns, quantised_columns
from resting.sparsifier.decoding.timing import COLD_BYTES
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.nearest import quantised

Row = dict[str, Any]
PLAIN = ("linear", "linear, input-major", "columns")
PEERS = {8: "torch int8", 4: "torch int4"}
TORCH_GROUPS = (32, 64, 128, 256)


def measure(
    matrix: Matrix, dtype: torch.dtype, weights: str, sparsities: list[float], threads: int
) -> tuple[list[Row], timing.Times]:
    """Time products from codes at every sparsity, and dense ones of as many bits and of plain weights, in turn.

    Parameters
    ----------
    matrix : Matrix
    dtype : torch.dtype
        Of inputs and outputs, and of plain weights.
    weights : str
        Format of the codes.
    sparsities : list of float
    threads : int

    Returns
    -------
    list of dict
        One row per alternative; one with a ``reason`` where there is no kernel or a group does not divide the outputs.
    dict of str to list of float
        Raw seconds.
    """
    form = Format.parse(weights)
    assert form is not None
    about = {"matrix": str(matrix), "dtype": str(dtype).removeprefix("torch."), "weights": weights}
    size = matrix.inputs * matrix.outputs
    copies = max(4, min(512, int(COLD_BYTES["cpu"] / (size * form.bits_a_weight / 8))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, matrix.inputs, generator=generator).to(dtype)
    drawn = torch.empty(matrix.outputs, matrix.inputs).normal_(0, 0.02, generator=generator)
    cutoffs = {0.0: -1.0} | {s: float(x.abs().float().quantile(s)) for s in sparsities if s}
    calls: Calls = {}
    try:
        held = quantised(drawn, form)
        for sparsity, cutoff in cutoffs.items():
            rule = Rule(threshold=max(cutoff, 0.0))
            products = [quantised_columns(held, rule, dtype, threads=threads) for _ in range(copies)]
            calls[f"codes {sparsity:g}"] = partial(_one_of, products, x)
    except SparsifierError as error:
        return [about | {"reason": str(error)}], {}
    calls |= _torch(form, matrix, x, copies) | _plain(drawn.to(dtype), x, threads)
    with torch.inference_mode():
        times = timing.interleaved(calls, max(ROUNDS, min(copies, 2 * ROUNDS)))
    return _rows(about, form, size, dtype, times), times


def _torch(form: Format, matrix: Matrix, x: torch.Tensor, copies: int) -> Calls:
    """Torch's product from codes of as many bits, where it has one for this dtype and group."""
    flat, aten = x[0], torch.ops.aten
    try:
        if form.bits == 8:
            codes = [torch.randint(-127, 128, (matrix.outputs, matrix.inputs), dtype=torch.int8) for _ in range(copies)]
            scales = torch.rand(matrix.outputs).to(x.dtype)
            aten._weight_int8pack_mm(flat, codes[0], scales)
            return {PEERS[8]: lambda i: aten._weight_int8pack_mm(flat, codes[i % copies], scales)}
        group = form.group if form.group in TORCH_GROUPS else TORCH_GROUPS[2]
        drawn = torch.randint(0, 16, (matrix.outputs, matrix.inputs), dtype=torch.int32)
        packed = aten._convert_weight_to_int4pack_for_cpu(drawn, 1)
        halves = [packed.clone() for _ in range(copies)]
        beside = torch.rand(matrix.inputs // group, matrix.outputs, 2).to(x.dtype)
        aten._weight_int4pack_mm_for_cpu(flat, halves[0], group, beside)
        return {PEERS[4]: lambda i: aten._weight_int4pack_mm_for_cpu(flat, halves[i % copies], group, beside)}
    except RuntimeError:  # not for this shape
        return {}


def _plain(weight: torch.Tensor, x: torch.Tensor, threads: int) -> Calls:
    """Dense products of weights as they are: the ways that `matrices.measure` has."""
    copies = max(4, COLD_BYTES["cpu"] // (weight.numel() * weight.itemsize))
    dense = [weight.clone() for _ in range(copies)]
    major = [input_major(w) for w in dense]
    products = [columns(w, Rule(), threads=threads) for w in major]
    return {
        "linear": lambda i: F.linear(x, dense[i % copies]),
        "linear, input-major": lambda i: F.linear(x, major[i % copies]),
        "columns": partial(_one_of, products, x),
    }


def _one_of(products: list[Any], x: torch.Tensor, index: int) -> object:
    return products[index % len(products)](x)


def _rows(about: Row, form: Format, size: int, dtype: torch.dtype, times: timing.Times) -> list[Row]:
    p20 = {name: timing.p20(values) for name, values in times.items()}
    plain = min((name for name in p20 if name in PLAIN), key=lambda name: p20[name])
    dense = min((name for name in p20 if name in ("codes 0", *PEERS.values())), key=lambda name: p20[name])
    rows = []
    for name, seconds in p20.items():
        is_code = name.startswith("codes")
        sparsity = float(name.split()[1]) if is_code else 0.0
        bits = 8 * dtype.itemsize if name in PLAIN else form.bits_a_weight
        rows.append(
            about
            | {
                "kernel": "codes" if is_code else name,
                "sparsity": sparsity,
                "seconds": seconds,
                "best_dense": dense,
                "best_plain": plain,
                "speedup": p20[dense] / seconds,
                "over_plain": p20[plain] / seconds,
                "share": p20[dense] / seconds * (1.0 - sparsity),
                "bandwidth": size * bits / 8 * (1.0 - sparsity) / seconds,
                "reason": "",
            }
        )
    return rows
