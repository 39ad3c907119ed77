"""CUDA graphs: many launches that cost one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WARM_UP = 3
"""Calls before a capture: they compile, and fill what is allocated once."""
TIMED = 15


def captured(
    call: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """Captures `call` as a CUDA graph, to be replayed; without a GPU it is called again.

    It is called a few times first, each time after `before`.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            before()
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    # The workspace of the library's products is then made in the capture, and lives as long as the graph. One that an
    # earlier capture made would be freed with that, or when torch.compile clears them for graphs of its own.
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds_of(replay: Callable[[], object], device: torch.device, before: Callable[[], object]) -> float:
    """Gives the median time of a call, each after `before`; the first ones do not count."""
    times = []
    for _ in range(WARM_UP + TIMED):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        replay()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[WARM_UP:])[TIMED // 2]
