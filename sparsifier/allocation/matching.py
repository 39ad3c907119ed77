"""Finds the nominal ratio at which the measured byte sparsity meets a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from resting.sparsifier.errors import TargetUnreachableError

T = TypeVar("T")


def match(
    make: Callable[[float], T],
    measure: Callable[[T], float],
    target: float,
    start: float,
    tolerance: float = 1.5e-3,
) -> tuple[T, float]:
    """Finds the nominal ratio whose *measured* byte sparsity is `target`.

    Thresholds are quantiles of the dense model's inputs; the inputs of a sparse model are smaller, so that more of
    them rest than was asked for (TEAL on the default model: 0.70 measured at 0.64 nominal).

    Parameters
    ----------
    make : callable
        From nominal ratio to plan.
    measure : callable
        From plan to measured byte sparsity.
    start : float
        First nominal ratio tried.

    Returns
    -------
    plan, measured
        The nearest of at most five tries.
    """
    if target == 0.0:
        plan = make(0.0)
        return plan, measure(plan)
    tries: list[tuple[float, float, T]] = []
    nominal, slope = start, 1.15
    for _ in range(5):
        try:
            plan = make(nominal)
        except TargetUnreachableError:
            if not tries:
                raise
            break  # a step went over the ceiling: the nearest try below it stands
        tries.append((nominal, measure(plan), plan))
        if abs(tries[-1][1] - target) <= tolerance:
            break
        if len(tries) > 1:
            (x0, y0, _), (x1, y1, _) = tries[-2:]
            if x1 != x0 and y1 != y0:
                slope = min(3.0, max(0.5, (y1 - y0) / (x1 - x0)))
        nominal = min(0.999, max(0.0, nominal + (target - tries[-1][1]) / slope))
    _, measured, plan = min(tries, key=lambda t: abs(t[1] - target))
    return plan, measured
