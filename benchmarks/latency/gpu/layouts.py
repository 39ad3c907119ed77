"""Layouts of a model's products, chosen between one another: what is fast alone can be in the way of the next."""

from __future__ import annotations

import torch

from resting.benchmarks.latency import timing
from resting.benchmarks.latency.gpu.graphs import GraphDecode
from resting.benchmarks.latency.gpu.model import GpuModel
from resting.sparsifier import Plan
from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.cuda_layouts import Shape
from resting.sparsifier.decoding.cuda_products import shapes_of

PASSES = 2
"""How often every product is looked at: the best for one depends on the others."""
TOKENS = 24


@torch.inference_mode()
def tune_layouts(model: GpuModel, plan: Plan, tuned: set[Shape]) -> None:
    """Lay out every product of a block as the model's step under `plan` is fastest, one product after another.

    The candidates are those that were fastest alone, timed in turn; what is chosen is used for all plans from then on,
    and joins what is `tuned`, which stays as it is.
    """
    block = model.decode(plan, compiled=False).decoder.blocks[0]
    new = sorted(shapes_of(block) - tuned, key=lambda shape: (-shape.inputs * shape.outputs, shape.kernel))
    for shape in new * PASSES:
        choices, best = cuda_layouts.finalists(shape), cuda_layouts.chosen(shape)
        try:
            decodes = {}
            for i, launch in enumerate(choices):
                cuda_layouts.prefer(launch, shape)
                decodes[str(i)] = model.decode(plan, compiled=False)
            best = choices[int(_fastest(model, decodes))]
        finally:
            cuda_layouts.prefer(best, shape)
    tuned.update(new)


def _fastest(model: GpuModel, decodes: dict[str, GraphDecode]) -> str:
    for decode in decodes.values():
        decode.begin()
    steps = min(TOKENS, model.ids.shape[1] - model.prompt - 1) - 1
    calls = {name: decode.step for name, decode in decodes.items()}
    times = timing.interleaved(calls, steps, timing.device_clock())
    return min(times, key=lambda name: timing.p20(times[name]))
