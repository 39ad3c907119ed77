"""Seconds of one call: for choices between kernels, made once a shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

COLD = {"cpu": 1 << 27, "cuda": 1 << 28}
"""Bytes of weights that are walked through, so that none is found in a cache."""
CALLS = 24
FAST = 5
"""One in so many calls may be faster than what is reported: the 20th percentile."""


def seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Time of one of `calls`, which differ in their weights only: the 20th percentile.

    On a GPU they are run as one CUDA graph, so that launches cost what they cost in a model's graph.
    """
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        calls[0](), calls[0]()  # compiles
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(6):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            torch.cuda.synchronize(device)
            times.append(began.elapsed_time(ended) / 1e3 / len(calls))
        return sorted(times)[1]
    times = []
    for call in [calls[0], *(calls[i % len(calls)] for i in range(CALLS))]:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[CALLS // FAST]
