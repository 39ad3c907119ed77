"""Measures, once per shape, from how many resting inputs on a kernel is faster than the dense product."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.products import columns, quantised_columns
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import COLD_BYTES, seconds_per_call
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.rule import Rule

SPARSEST = 0.9


def break_even(weight: Tensor, threads: int = 1) -> float:
    """Gives the share of inputs at rest, in [0, 1], from which the column kernel beats `torch.nn.functional.linear`.

    The kernel's time is taken as linear in what it reads, between nothing and nine tenths at rest.

    Parameters
    ----------
    weight : Tensor [out, in]
        Of the shape, dtype and device in question.
    threads : int
        On a CPU.
    """
    out, width = weight.shape
    what = f"{width}x{out} {weight.dtype}"

    def measure() -> float:
        return _measured(out, width, weight.dtype, weight.device, threads_for(weight, threads))

    return float(remembered("break-even", what, weight.device, measure))


def threads_for(weight: Tensor, threads: int) -> int:
    """Chooses the faster count of threads for this shape: `threads`, or 1 where waking others costs more."""
    return threads if threads == 1 or weight.device.type != "cpu" else _worth(*weight.shape, weight.dtype, threads)


@cache
def _worth(out: int, width: int, dtype: torch.dtype, threads: int) -> int:
    count = max(2, min(256, COLD_BYTES["cpu"] // (out * width * dtype.itemsize)))
    kernels = [torch.full((width, out), 0.01, dtype=dtype).t() for _ in range(count)]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1.0, 1.0, width)[order].to(dtype)[None, None]

    def time(of: int) -> float:
        products = [columns(w, Rule(threshold=0.5), threads=of) for w in kernels]
        return seconds_per_call([partial(product, x) for product in products], torch.device("cpu"))

    return min((1, threads), key=time)


@cache
def threads_for_codes(form: Format, out: int, width: int, dtype: torch.dtype, threads: int) -> int:
    """Chooses as `threads_for`, for the product of a matrix from codes; `form` has a kernel."""
    if threads == 1:
        return 1
    codes, groups = torch.ones(width, out, dtype=torch.int8), torch.full((width, out // form.group), 0.01).half()
    held = QuantisedWeight(form, codes, groups)
    count = max(2, min(256, int(COLD_BYTES["cpu"] / (held.bits / 8))))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1.0, 1.0, width)[order].to(dtype)[None, None]

    def time(of: int) -> float:
        products = [quantised_columns(held, Rule(threshold=0.5), dtype, threads=of) for _ in range(count)]
        return seconds_per_call([partial(product, x) for product in products], torch.device("cpu"))

    return min((1, threads), key=time)


@cache
def _measured(out: int, width: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    count = max(2, min(256, COLD_BYTES[device.type] // (out * width * dtype.itemsize)))
    dense = [torch.full((out, width), 0.01, dtype=dtype, device=device) for _ in range(count)]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))  # what rests is scattered
    x = torch.linspace(-1.0, 1.0, width)[order].to(device, dtype)[None, None]
    linear = seconds_per_call([partial(F.linear, x, w) for w in dense], device)
    kernels = [input_major(w) for w in dense]

    def kernel(rule: Rule) -> float:
        products = [columns(w, rule, threads=threads) for w in kernels]
        return seconds_per_call([partial(product, x) for product in products], device)

    full, thin = kernel(Rule()), kernel(Rule(threshold=SPARSEST))
    slope = (full - thin) / SPARSEST
    if slope <= 0.0:
        return 0.0 if thin <= linear else 1.0
    return min(1.0, max(0.0, (full - linear) / slope))
