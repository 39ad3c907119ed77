"""Layouts of a model's products, chosen between one another: what is fast alone can be in the way of the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.latency import timing
from sparsifier import Plan
from sparsifier.kernels import launches
from sparsifier.sites import ACT

if TYPE_CHECKING:
    from benchmarks.latency.gpu import GpuModel
    from benchmarks.latency.graphs import GraphDecode

ORDER = ("mlp", "down", "attention", "o")
"""Largest first."""
PASSES = 2
"""How often every product is looked at: the best for one depends on the others."""
TOKENS = 24


@torch.inference_mode()
def settle(model: GpuModel, plan: Plan) -> None:
    """Have every product of a block laid out as the model's step under `plan` is fastest, one product after another.

    The candidates are those that were fastest alone, timed in turn; what is chosen is used for all plans from then on.
    Under an act mask gate and up do not lie side by side, and their layouts stay as they are.
    """
    masked = any(site.role == ACT for site in plan.rules)
    for name in ORDER * PASSES:
        if name == "mlp" and masked:
            continue
        of = model.weights[0][name]
        outputs, inputs = of.major.shape
        shape = inputs, outputs, of.major.dtype, of.major.device, tuple(of.widths[:-1])
        choices, best = launches.finalists(*shape), launches.columns_launch(*shape)
        try:
            ways = {}
            for i, launch in enumerate(choices):
                launches.prefer(launch, *shape)
                ways[str(i)] = model.decode(plan, compiled=False)
            best = choices[int(_fastest(model, ways))]
        finally:
            launches.prefer(best, *shape)


def _fastest(model: GpuModel, ways: dict[str, GraphDecode]) -> str:
    for way in ways.values():
        way.begin()
    steps = min(TOKENS, model.ids.shape[1] - model.prompt - 1) - 1
    times = timing.in_turn({name: way.step for name, way in ways.items()}, steps, timing.device_clock())
    return min(times, key=lambda name: timing.fast(times[name]))
