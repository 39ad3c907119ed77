"""Ratios of times taken in turn in this process: the only thing about speed that two machines can agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from resting.benchmarks.latency import timing
from resting.sparsifier import Rule
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.products import columns

SIZE, COPIES, ROUNDS = 2048, 8, 24


def measure(kernel: Any = columns) -> dict[str, float]:
    """How much faster the column kernel is with nine tenths at rest than with nothing, and than the library's product.

    Parameters
    ----------
    kernel : callable
        `columns`, or what is to be caught.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(COPIES)]
    x = torch.randn(1, 1, SIZE, generator=generator)
    major = [input_major(w) for w in weights]
    cutoff = float(x.abs().quantile(0.9))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        full, thin = ([kernel(w, Rule(threshold=t), threads=1) for w in major] for t in (0.0, cutoff))
        calls = {
            "linear": lambda i: F.linear(x, weights[i % COPIES]),
            "full": lambda i: full[i % COPIES](x),
            "thin": lambda i: thin[i % COPIES](x),
        }
        times = {name: timing.p20(seconds) for name, seconds in timing.interleaved(calls, ROUNDS).items()}
    finally:
        torch.set_num_threads(before)
    return {
        "kernel 0.9 over 0": times["full"] / times["thin"],
        "kernel 0.9 over linear": times["linear"] / times["thin"],
    }
