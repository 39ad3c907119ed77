"""Timing of alternatives in one process, in turn, on weights that no cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

FAST = 0.20
"""The quantile that ratios are taken of: what a neighbour on the machine adds is above it."""
Times = dict[str, list[float]]
"""Seconds of every call, by alternative."""


def in_turn(calls: Mapping[str, Callable[[int], object]], rounds: int) -> Times:
    """Time every alternative once a round, in an order that rotates; the first round is not counted.

    Parameters
    ----------
    calls : dict of str to callable
        Given a number that grows by one with every call, so that each can take weights that were not touched lately.
    rounds : int
    """
    names = list(calls)
    times: Times = {name: [] for name in names}
    count = 0
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            calls[name](count)
            times[name].append(time.perf_counter() - began)
            count += 1
    return {name: values[1:] for name, values in times.items()}


def quantile(seconds: list[float], q: float) -> float:
    return float(np.quantile(seconds, q))


def fast(seconds: list[float]) -> float:
    """The time of an undisturbed call."""
    return quantile(seconds, FAST)
