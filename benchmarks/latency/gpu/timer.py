"""Plans of a model on a GPU against its fastest dense path, with the layouts that its own steps are fastest with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.latency.decode import neutral
from resting.benchmarks.latency.gpu.layouts import tune_layouts
from resting.benchmarks.latency.gpu.model import GpuModel
from resting.benchmarks.latency.timed_model import TimedModel
from resting.sparsifier import Plan, SparsifierError, TokenPolicy
from resting.sparsifier.decoding.cuda_layouts import Shape

HALF = 0.5
"""Target that layouts are chosen at, or near."""


class GpuTimer:
    """Times plans of a model against the fastest of its captured dense steps.

    Parameters
    ----------
    model : TimedModel
    prompt : int
        Tokens before those that are timed.
    cells : list of Cell
        All that will be timed: layouts are chosen under their plans.

    Attributes
    ----------
    path : str
        The fastest dense path.
    tried : dict of str to float or str
        Seconds per token of every dense path, or why it did not run.
    """

    def __init__(self, model: TimedModel, prompt: int, cells: list[Cell]) -> None:
        self._model = GpuModel(model, prompt)
        tune_for_cells(self._model, model, cells)
        self.path, self._dense, self.tried = self._model.fastest_dense()

    def times(self, plan: Plan, base: Plan | None, policy: TokenPolicy) -> dict[str, Any]:
        """Decode under `plan`, and under `base`, in turn with the dense step; its prompt is not timed.

        Every token goes through the captured step: the policy, which is about prompts, changes nothing here.
        """
        return self._model.compare(self._dense, plan, base)


def tune_for_cells(gpu_model: GpuModel, model: TimedModel, cells: list[Cell]) -> None:
    """Choose layouts under every method, at its target nearest to half, and for the dense path by kernels.

    What two have in common is chosen under the first.
    """
    tuned: set[Shape] = set()
    nearest = sorted(cells, key=lambda cell: -abs(cell.target - HALF))  # the last of a method stays
    chosen = {cell.label: cell for cell in nearest}
    for label in dict.fromkeys(cell.label for cell in cells):
        with suppress(SparsifierError, torch.OutOfMemoryError):  # is told in the cell's row
            tune_layouts(gpu_model, model.plan(chosen[label]), tuned)
    with suppress(SparsifierError, torch.OutOfMemoryError):
        tune_layouts(gpu_model, neutral(gpu_model.model), tuned)
