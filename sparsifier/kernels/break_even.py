"""From how many resting inputs on a kernel is faster than the dense product: measured, once a shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifier.kernels.columns import columns, input_major
from sparsifier.rule import Rule

COLD = 1 << 27
"""Bytes of weights that are walked through, so that none is found in a cache."""
CALLS = 24
SPARSE = 0.9


def break_even(weight: Tensor, threads: int = 1) -> float:
    """Share of inputs at rest from which the column kernel beats `torch.nn.functional.linear`, in [0, 1].

    The kernel's time is taken as linear in what it reads, between nothing and nine tenths at rest.

    Parameters
    ----------
    weight : Tensor [out, in]
        Of the shape and dtype in question.
    threads : int
    """
    return _measured(*weight.shape, weight.dtype, threads)


@cache
def _measured(out: int, width: int, dtype: torch.dtype, threads: int) -> float:
    count = max(1, min(256, COLD // (out * width * dtype.itemsize)))
    dense = [torch.full((out, width), 0.01, dtype=dtype) for _ in range(count)]
    x = torch.linspace(-1.0, 1.0, width, dtype=dtype)[None, None]
    every, few = Rule(), Rule(threshold=SPARSE)
    linear = _time([lambda w=w: F.linear(x, w) for w in dense])
    kernels = [input_major(w) for w in dense]
    full, thin = (_time([columns(w, rule, threads=threads) for w in kernels], x) for rule in (every, few))
    slope = (full - thin) / SPARSE
    if slope <= 0.0:
        return 0.0 if thin <= linear else 1.0
    return min(1.0, max(0.0, (full - linear) / slope))


def _time(calls: list[Callable[..., object]], *arguments: Tensor) -> float:
    """Seconds of one call: the 20th percentile, every call on weights of its own."""
    times = []
    for call in [calls[0], *(calls[i % len(calls)] for i in range(CALLS))]:
        began = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[CALLS // 5]
