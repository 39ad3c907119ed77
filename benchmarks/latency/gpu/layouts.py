"""Layouts of a model's products, chosen between one another: what is fast alone can be in the way of the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from resting.benchmarks.latency import timing
from resting.sparsifier import Plan
from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.cuda_products import shapes_of

if TYPE_CHECKING:
    from resting.benchmarks.latency.gpu.graphs import GraphDecode
    from resting.benchmarks.latency.gpu.model import GpuModel
    from resting.sparsifier.decoding.cuda_layouts import Shape

PASSES = 2
"""How often every product is looked at: the best for one depends on the others."""
TOKENS = 24


@torch.inference_mode()
def settle(model: GpuModel, plan: Plan, settled: set[Shape]) -> None:
    """Have every product of a block laid out as the model's step under `plan` is fastest, one product after another.

    The candidates are those that were fastest alone, timed in turn; what is chosen is used for all plans from then on,
    and joins what is `settled`, which stays as it is.
    """
    block = model.decode(plan, compiled=False).decoder.blocks[0]
    new = sorted(shapes_of(block) - settled, key=lambda shape: (-shape.inputs * shape.outputs, shape.kernel))
    for shape in new * PASSES:
        choices, best = cuda_layouts.finalists(shape), cuda_layouts.chosen(shape)
        try:
            ways = {}
            for i, launch in enumerate(choices):
                cuda_layouts.prefer(launch, shape)
                ways[str(i)] = model.decode(plan, compiled=False)
            best = choices[int(_fastest(model, ways))]
        finally:
            cuda_layouts.prefer(best, shape)
    settled.update(new)


def _fastest(model: GpuModel, ways: dict[str, GraphDecode]) -> str:
    for way in ways.values():
        way.begin()
    steps = min(TOKENS, model.ids.shape[1] - model.prompt - 1) - 1
    times = timing.interleaved({name: way.step for name, way in ways.items()}, steps, timing.device_clock())
    return min(times, key=lambda name: timing.fast(times[name]))
