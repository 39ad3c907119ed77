"""All that the guard measures, and the file of references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resting.benchmarks import cache, provenance
from resting.benchmarks.checks.guard import check, exact, quality, speed


def measured() -> dict[str, Any]:
    """Every figure, by name."""
    model, tokenizer = quality.embedded()
    calibration, evaluation = quality.windows(tokenizer)
    return exact.measure() | quality.measure(model, quality.plans(model, calibration), evaluation) | speed.measure()


def write(path: Path, found: dict[str, Any]) -> None:
    """Write references, with the machine they are from; ratios of times have none."""
    values = {name: value for name, value in found.items() if name not in check.LEAST}
    facts = {"values": values, "measured_on": provenance.collect("cpu")}
    cache.write_whole(path, json.dumps(facts, indent=1) + "\n")
