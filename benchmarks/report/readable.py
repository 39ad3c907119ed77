"""Whether a folder of results can be reported: what is wrong with it is said before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from resting.benchmarks.errors import BenchmarkError, first_line

QUALITY = ["model", "method", "target", "byte_sparsity", "seed", "metric", "value", "dataset", "tokens", "reason"]
TIMES = ["model", "dtype", "threads", "method", "target"]


@contextmanager
def results(folder: Path) -> Iterator[None]:
    """Check `folder`, and name it where its report finds something else in it than a run writes.

    Raises
    ------
    BenchmarkError
        If files are missing or damaged; the message says which, and what belongs there.
    """
    facts = _facts(folder)
    if (folder / "decode.csv").exists():
        _check_table(folder / "decode.csv", TIMES, may_be_empty=True)
    elif "cells" in facts:  # what a study or an older version wrote is told by the report
        _check_table(folder / "results.csv", QUALITY, may_be_empty=False)
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BenchmarkError(
            f"{folder} holds results that cannot be shown ({type(error).__name__}: {first_line(error)}): "
            f"run `resting run {folder.name}` again"
        ) from error


def _facts(folder: Path) -> dict[str, object]:
    file = folder / "provenance.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(
            f"no results in {folder}: run `resting run {folder.name}` first ({file.name}: {error.strerror})"
        ) from error
    except ValueError as error:
        raise BenchmarkError(
            f"{file} is not JSON ({first_line(error)}): run `resting run {folder.name}` again"
        ) from None
    if not isinstance(facts, dict):
        raise BenchmarkError(f"{file} holds a {type(facts).__name__}; allowed: a JSON object")
    return facts


def _check_table(file: Path, columns: list[str], may_be_empty: bool) -> None:
    again = f"run `resting run {file.parent.name}` again"
    try:
        frame = pd.read_csv(file)
    except pd.errors.EmptyDataError:
        if may_be_empty:
            return
        raise BenchmarkError(f"{file} is empty: {again}") from None
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read ({error.strerror}): {again}") from error
    except ValueError as error:
        raise BenchmarkError(f"{file} is no CSV table ({first_line(error)}): {again}") from error
    if lacking := [column for column in columns if column not in frame]:
        raise BenchmarkError(f"{file} has no column {lacking[0]!r}; it needs {', '.join(columns)}: {again}")
    if frame.empty and not may_be_empty:
        raise BenchmarkError(f"{file} has no rows: {again}")
