"""Says whether a suite's windows fit a model, before anything of it is loaded."""

from __future__ import annotations

from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.quality import limits


def check(suite: Suite, source: ModelSource) -> None:
    """Refuse a suite with windows that are longer than the model has positions for.

    Raises
    ------
    ModelError
        Names the setting and the model's limit. The sizes of published calibrations are cut to the limit instead.
    """
    lengths = {}
    if suite.evaluation.texts:
        lengths = {
            "evaluation.window": suite.evaluation.window,
            "calibration.window": suite.calibration.window,
            "calibration.matching_window": suite.calibration.matching_window,
        }
    if suite.latency is not None:
        lengths["latency.prompt + latency.decoded_tokens"] = suite.latency.prompt + suite.latency.decoded_tokens
    limits.check_windows(source, lengths)
