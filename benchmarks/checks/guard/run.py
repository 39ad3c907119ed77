"""Measures all that the guard compares, and writes the file of references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resting.benchmarks import cache, provenance
from resting.benchmarks.checks.guard import check, exact, quality, speed


def measured(micro: Path | None = None) -> dict[str, Any]:
    """Measure every figure, by name.

    Parameters
    ----------
    micro : Path, optional
        The JSON of a run of the micro-benchmarks, to read the ratios of times from; without it they are measured.
    """
    times = speed.measure() if micro is None else speed.read(micro)
    model, tokenizer = quality.embedded()
    calibration, evaluation = quality.windows(tokenizer)
    plans, reference = quality.plans(model, calibration), quality.dense(model, evaluation)
    return exact.measure() | quality.measure_dense(reference) | quality.measure(reference, plans) | times


def write(path: Path, found: dict[str, Any]) -> None:
    """Write references, with the machine they are from; ratios of times have none."""
    values = {name: value for name, value in found.items() if name not in check.LEAST}
    facts = {"values": values, "measured_on": provenance.collect("cpu")}
    cache.write_whole(path, json.dumps(facts, indent=1) + "\n")
