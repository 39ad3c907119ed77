"""Measures random cells of committed results again, and compares."""

from __future__ import annotations

import json
import math
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks.assets import models
from resting.benchmarks.cells import own_texts
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options, one_model
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import of_weights
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.weight_formats import in_formats
from resting.benchmarks.report.folder import read_results
from resting.benchmarks.sweep.jobs import Worker, jobs_of
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.store import FINISHED, Store


@dataclass(frozen=True)
class Verified:
    """Holds one number, as it was committed and as it is now.

    Attributes
    ----------
    name : str
        Method, target and metric.
    committed, measured : float
        The latter is NaN where there is no number now.
    stderr : float
        Of the committed one.
    agrees : bool
        Never where there is no number now.
    reason : str
        Why there is no number now.
    """

    name: str
    committed: float
    measured: float
    stderr: float
    agrees: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{'LOST':<8} {self.name:<64} {self.committed:<12.6g} no number now: {self.reason}"
        mark = "agrees" if self.agrees else "DIFFERS"
        return f"{mark:<8} {self.name:<64} {self.committed:<12.6g} {self.measured:<12.6g} ± {self.stderr:.2g}"


def verify(
    folder: Path, options: Options, sample: int, seed: int, tolerance: float, console: Console
) -> list[Verified]:
    """Measure random cells of a results folder again, nothing being taken from the store of results.

    Parameters
    ----------
    folder : Path
        With results.csv and provenance.json, which holds the suite as it was run.
    options : Options
        Model (where the suite's is not at hand) and texts.
    sample : int
        Number of cells.
    seed : int
    tolerance : float
        Relative difference up to which numbers agree: versions and processors round differently.

    Raises
    ------
    BenchmarkError
        If the folder cannot be read, holds times, or several models of which none is named; or a cell fails now,
        which agrees with nothing.
    """
    suite, rows = _read(folder)
    suite = own_texts.resolved(suite, options.texts)
    spec = one_model(suite, options.model)
    source = models.resolve(spec, console.say, console.stage, trusted=options.trusted)
    sources = in_formats([source], suite.weights)
    of = {one: rows[rows.model == _model_of(folder, rows, of_weights(one.sha256))] for one in sources}
    jobs = jobs_of(suite, cells_of(suite, options.methods), options, sources, {}, Mode.FORCE)
    numbered = {one: _with_numbers(mine) for one, mine in of.items()}
    cells = [
        (job, key)
        for job in jobs
        for key, cell in job.cells
        if (job.label, cell.target, cell.seed, str(cell.policy)) in numbered[job.source]
    ]
    if not cells:
        raise BenchmarkError(f"{folder} has no number of a cell of the suite: nothing can be measured again")
    chosen = random.Random(seed).sample(cells, min(sample, len(cells)))
    found: list[Verified] = []
    worker = Worker(console)
    with tempfile.TemporaryDirectory() as empty:
        for number, (job, key) in enumerate(chosen):
            only = tuple((k, cell) for k, cell in job.cells if k == key)
            console.begin(number, len(chosen), f"{job.label} at {only[0][1].target:g}")
            for _, _, result, _ in worker.results(replace(job, cells=only, store=Store(Path(empty)))):
                assert result is not None
                if result.status not in (*FINISHED, "missing"):
                    raise BenchmarkError(f"{job.label} at {only[0][1].target:g} {result.status}: {_reason(result)}")
                found += _compared(_of_cell(of[job.source], job.label, only[0][1]), result, tolerance)
    console.end()
    return found


def _reason(result: Result) -> str:
    """Say why a cell has no result."""
    given = (row["reason"] for row in result.rows if row.get("reason"))
    return str(result.info.get("reason") or next(given, "no reason is known"))


def _read(folder: Path) -> tuple[Suite, pd.DataFrame]:
    try:
        suite = Suite.model_validate(json.loads((folder / "provenance.json").read_text())["suite"])
        return suite, read_results(folder)
    except (OSError, ValueError, KeyError, BenchmarkError) as error:
        raise BenchmarkError(
            f"{folder} cannot be verified, it takes provenance.json and results.csv: {error}"
        ) from None


def _model_of(folder: Path, rows: pd.DataFrame, weights: str) -> str:
    """Return the name under which a folder has the numbers of these weights; its only one where it knows no weights."""
    known = rows.drop_duplicates("model").set_index("model").weights
    found = known[known == weights]
    if len(found):
        return str(found.index[0])
    if known.isna().all() and len(known) == 1:
        return str(known.index[0])
    there = ", ".join(f"{name} ({of})" for name, of in known.items())
    raise BenchmarkError(f"{folder} has no numbers of the weights {weights}; it has those of {there}")


def _with_numbers(rows: pd.DataFrame) -> set[tuple[Any, ...]]:
    """Cells that have a number: of one that was refused, another refusal would verify nothing."""
    names = ["method", "target", "seed", "tokens"]
    return set(rows[rows.value.notna()][names].itertuples(index=False, name=None))


def _of_cell(rows: pd.DataFrame, label: str, cell: Cell) -> pd.DataFrame:
    """Return the committed numbers of a cell."""
    wanted = {"method": label, "target": cell.target, "seed": cell.seed, "tokens": str(cell.policy)}
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return rows[rows.value.notna()]


def _compared(committed: pd.DataFrame, result: Result, tolerance: float) -> list[Verified]:
    """Compare every committed number of a cell; one that there is none for now is named with the reason."""
    measured = {row["metric"]: row for row in result.rows}
    found = []
    for row in committed.to_dict("records"):
        name = f"{row['method']} at {row['target']:g}: {row['metric']}"
        was, error = float(row["value"]), 0.0 if pd.isna(row["stderr"]) else float(row["stderr"])
        now = measured.get(row["metric"], {})
        if (value := now.get("value")) is None:
            reason = str(now.get("reason") or f"this metric is not measured, the cell is {result.status}")
            found.append(Verified(name, was, math.nan, error, False, reason))
            continue
        agrees = abs(value - was) <= tolerance * max(abs(was), abs(value), 1e-12)
        found.append(Verified(name, was, float(value), error, agrees))
    return found
