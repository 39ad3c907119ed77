"""Layouts of a model's products, chosen between one another: what is fast alone can be in the way of the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.latency import timing
from sparsifier import Plan
from sparsifier.kernels import launches

if TYPE_CHECKING:
    from benchmarks.latency.gpu import GpuModel

ORDER = ("mlp", "down", "attention", "o")
"""Largest first."""
TOKENS = 24


@torch.inference_mode()
def settle(model: GpuModel, plan: Plan) -> None:
    """Have every product of a block laid out as the model's step under `plan` is fastest, one product after another.

    The candidates are those that were fastest alone; what was chosen is used for all plans from then on.
    """
    for name in ORDER:
        of = model.weights[0][name]
        outputs, inputs = of.major.shape
        shape = inputs, outputs, of.major.dtype
        widths = tuple(of.widths[:-1])
        choices = launches.finalists(*shape, of.major.device, widths)
        best = min(choices, key=lambda launch: _seconds(model, plan, partial(launches.prefer, launch, *shape, widths)))
        launches.prefer(best, *shape, widths)


def _seconds(model: GpuModel, plan: Plan, prefer: Callable[[], None]) -> float:
    prefer()
    way = model.decode(plan, compiled=False)
    way.begin()
    steps = min(TOKENS, model.ids.shape[1] - model.prompt - 1)
    return timing.fast(timing.in_turn({"sparse": way.step}, steps - 1, timing.device_clock())["sparse"])
