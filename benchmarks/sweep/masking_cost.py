"""Times what masks cost: provenance of a run, and not a number of a cell."""

from __future__ import annotations

import statistics
import time

import torch

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.sparsifier.logits import final_hidden

ROUNDS = 5


@torch.no_grad()
def masked_over_dense(loaded: LoadedModel, cell: Cell, rounds: int = ROUNDS) -> float | None:
    """Return the time of a masked forward over that of a dense one: the median of ratios taken in turn.

    None for a cell whose plan masks nothing.
    """
    plan, calibration = fitted(loaded, cell), loaded.calibrated(cell).calibration
    if plan.is_dense:
        return None
    ids = calibration.windows[:2].to(next(loaded.model.parameters()).device)

    def seconds() -> float:
        begin = time.perf_counter()
        hidden = final_hidden(loaded.model, ids)
        float(hidden[0, 0, 0])  # waits for the device
        return time.perf_counter() - begin

    ratios = []
    for _ in range(rounds + 1):
        dense = seconds()
        with plan.applied(loaded.model, calibration.tokens):
            ratios.append(seconds() / dense)
    return statistics.median(ratios[1:])
