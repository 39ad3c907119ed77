"""Measures how far figures move when thresholds and biases round differently: where the guard's tolerances are from.

``python -m resting.benchmarks.checks.guard.jitter`` prints what `check.py` quotes; it takes two minutes on two cores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from resting.benchmarks.checks.guard import check, exact, quality
from resting.sparsifier import Plan

FLOAT32 = 1e-7
"""Relative rounding of float32, nearly: 2^-23 is 1.2e-7."""
SEEDS = 12


def jittered(plan: Plan, seed: int, relative: float = FLOAT32) -> Plan:
    """Change every threshold and every entry of a bias by `relative` of itself times a normal number."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value.double() * (1.0 + relative * noise)

    rules = {}
    for site, rule in plan.rules.items():
        threshold = moved(torch.as_tensor(rule.threshold, dtype=torch.float64))
        bias = None if rule.bias is None else moved(rule.bias)
        rules[site] = replace(rule, threshold=threshold if threshold.dim() else float(threshold), bias=bias)
    return replace(plan, rules=rules)


def of_quality(reference: Any, plans: dict[str, Plan], seed: int) -> dict[str, Any]:
    """Measure the figures of the embedded model under jitter."""
    return quality.measure(reference, {name: jittered(plan, seed) for name, plan in plans.items()})


def of_exact(seed: int) -> dict[str, Any]:
    """Measure the figures of the tiny model under jitter."""
    return exact.measure(lambda plan: jittered(plan, seed))


def main() -> None:
    """Print for every figure its value, the largest distance from it under jitter, and its tolerance."""
    model, tokenizer = quality.embedded()
    calibration, evaluation = quality.windows(tokenizer)
    plans, reference = quality.plans(model, calibration), quality.dense(model, evaluation)
    still = quality.measure(reference, plans)
    moved = [of_quality(reference, plans, seed) for seed in range(SEEDS)]
    rows = [
        [name, f"{value:.7f}", f"{max(abs(one[name] - value) for one in moved):.1e}", f"{check.tolerance(name):g}"]
        for name, value in still.items()
    ]
    print(tabulate(rows, ["figure", "value", f"largest move of {SEEDS}", "tolerance"], disable_numparse=True))
    same = sum(of_exact(seed) == exact.measure() for seed in range(SEEDS))
    print(f"\nMasks and bytes of the tiny model: the same in {same} of {SEEDS}")


if __name__ == "__main__":
    main()
