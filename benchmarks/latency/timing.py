"""Timing of alternatives in one process, in turn, on weights that no cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

RATIO_QUANTILE = 0.20
"""The quantile that ratios are taken of: what a neighbour on the machine adds is above it."""
Times = dict[str, list[float]]
"""Seconds of every call, by alternative."""
Clock = Callable[[Callable[[], object]], float]
"""Runs a call, and tells its seconds."""


def wall(call: Callable[[], object]) -> float:
    """Time a call by the clock on the wall."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def on_gpu(call: Callable[[], object]) -> float:
    """Time a call by the device's own events, from before it until all that it started is done."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def device_clock() -> Clock:
    """Choose the GPU's own clock, where there is one."""
    return on_gpu if torch.cuda.is_available() else wall


def interleaved(calls: Mapping[str, Callable[[int], object]], rounds: int, clock: Clock = wall) -> Times:
    """Time every alternative once per round, in an order that rotates; the first round is not counted.

    Parameters
    ----------
    calls : dict of str to callable
        Given a number that grows by one with every call, so that each can take weights that were not touched lately.
    rounds : int
    clock : callable
        `wall` or `on_gpu`.
    """
    names = list(calls)
    times: Times = {name: [] for name in names}
    count = 0
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(partial(calls[name], count)))
            count += 1
    return {name: values[1:] for name, values in times.items()}


def quantile(seconds: list[float], q: float) -> float:
    """Take a quantile of all calls."""
    return float(np.quantile(seconds, q))


def p20(seconds: list[float]) -> float:
    """Take the time of an undisturbed call: `RATIO_QUANTILE` of all."""
    return quantile(seconds, RATIO_QUANTILE)


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Measure the bytes per second, read and written, of a copy on the device: what a kernel can reach."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    times = interleaved({"copy": lambda _: target.copy_(source)}, 20, device_clock())
    return 2 * size / p20(times["copy"])
