"""Keeps fitted plans: one in the cache serves every suite that fits the same method to the same model and text.

A plan that files cannot hold (`Plan.is_plain`) is fitted in every run that measures its cell.
"""

from __future__ import annotations

import shutil

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import cell_key
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import Plan, PlanError


def fitted(loaded: LoadedModel, cell: Cell) -> Plan:
    """Return the fitted plan of `cell`, from the cache where it was fitted before.

    Raises
    ------
    SparsifierError
        If the method cannot be fitted.
    """
    folder = cache.root() / "plans" / cell_key(cell, loaded.fit_setting)[:32]
    if folder.exists():
        try:
            return Plan.load(folder)
        except PlanError:
            shutil.rmtree(folder)
    plan = cell.sparsifier.plan_for(loaded.calibrated(cell))
    if plan.is_plain:
        plan.save(folder)
    return plan
