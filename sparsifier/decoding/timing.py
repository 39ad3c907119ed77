"""Times single calls, for choices between kernels that are made once per shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Bytes of weights that are walked through, so that none is found in a cache, even if a tenth of them is read."""
TIMED_CALLS = 24
WARM_UP_SECONDS = 0.01
"""Seconds of work before a GPU is timed: its clock is slow to rise."""
GRAPH_REPLAYS = 9
QUANTILE = 0.20
"""Says which of the measured times is reported: a low one, since disturbances only make calls longer."""


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Times one of `calls`, which differ in their weights only, and reports the 20th percentile.

    On a GPU they are run as one CUDA graph, so that launches cost what they cost in a model's graph.
    """
    if device.type == "cuda":
        return _in_a_graph(calls, device)
    times = []
    for call in [calls[0], *(calls[i % len(calls)] for i in range(TIMED_CALLS))]:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[int(QUANTILE * TIMED_CALLS)]


def _in_a_graph(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    graph = torch.cuda.CUDAGraph()
    count = len(calls) * -(-TIMED_CALLS // len(calls))
    calls[0](), calls[0]()  # compiles
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_SECONDS:
        graph.replay()
        torch.cuda.synchronize(device)
    times = []
    for _ in range(GRAPH_REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize(device)
        times.append(began.elapsed_time(ended) / 1e3 / count)
    return sorted(times)[int(QUANTILE * GRAPH_REPLAYS)]
