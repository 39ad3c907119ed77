"""Keeps fitted plans: one in the cache serves every suite that fits the same method to the same model and text.

A plan that files cannot hold (`Plan.is_plain`) is fitted in every run that measures its cell.
"""

from __future__ import annotations

import shutil

from resting.benchmarks import cache
from resting.benchmarks.cells import code
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import cell_key
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import Compensated, Plan, PlanError, Sparsifier, Transformed
from resting.sparsifier.quantised.formats import AS_IS
from resting.sparsifier.quantised.model import check_plan


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
    check_method(loaded.source.weights, cell.sparsifier)
    plan = cell.sparsifier.plan_for(loaded.calibrated(cell))
    check_plan(loaded.model, plan)
    if plan.is_plain:
        code.check_unchanged()
        plan.save(folder)
    return plan


def check_method(stored: str, method: Sparsifier) -> None:
    """Refuse, before it is fitted, a method whose plan `check_plan` would: it rewrites the model or replaces weights.

    Parameters
    ----------
    stored : str
        Format of the model's weights.
    method : Sparsifier

    Raises
    ------
    PlanError
    """
    allowed = "allowed on quantised weights: methods that leave the weights as they are"
    while stored != AS_IS:
        if isinstance(method, Transformed):
            raise PlanError(
                f"{method.name} rewrites the model: its matrices would not be those stored as {stored}; {allowed}"
            )
        if method.replaces_weights:
            raise PlanError(f"{method.label} replaces weights, which are stored as {stored}; {allowed}")
        if not isinstance(method, Compensated):
            return
        method = method.inner
