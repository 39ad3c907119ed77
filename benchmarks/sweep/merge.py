"""Joins the stores of several machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from resting.benchmarks.cells.cell import Result
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.store import FINISHED, Store


@dataclass
class Merged:
    """Tells what joining did: cells that came in, cells that were here already, a line for every contradiction."""

    added: int = 0
    same: int = 0
    conflicts: list[str] = field(default_factory=list)


def merge(into: Store, folders: list[Path]) -> Merged:
    """Copy the finished cells of other stores into `into`, which keeps what it has.

    Parameters
    ----------
    into : Store
    folders : list of Path
        Stores, or cache folders that hold one under ``cells``.

    Raises
    ------
    BenchmarkError
        If a folder holds no store.
    StoreError
        If a cell was written by a newer version.
    """
    others = [_store(folder) for folder in folders]
    merged = Merged()
    for other in others:
        for key in sorted(other.keys()):
            theirs, ours = other.load(key), into.load(key)
            if theirs is None or theirs.status not in FINISHED:
                continue
            if ours is None or ours.status not in FINISHED:
                into.save(key, theirs)
                merged.added += 1
            elif _values(ours) == _values(theirs):
                merged.same += 1
            else:
                merged.conflicts += [f"{line} in {other.folder}" for line in _differences(ours, theirs)]
    return merged


def _store(folder: Path) -> Store:
    inner = folder / "cells"
    found = Store(inner if inner.is_dir() else folder)
    if not found.folder.is_dir() or (found.folder == folder and next(found.keys(), None) is None):
        raise BenchmarkError(f"{folder} holds no store: neither cells/ nor cells (JSON files) are there")
    return found


def _values(result: Result) -> dict[str, tuple[object, object]]:
    return {row["metric"]: (row["value"], row["reason"]) for row in result.rows}


def _differences(ours: Result, theirs: Result) -> list[str]:
    mine, other = _values(ours), _values(theirs)
    row = (ours.rows or theirs.rows)[0]
    name = f"{row['model']}, {row['method']} at {row['target']:g}"
    return [
        f"{name}: {metric} is {mine.get(metric, ('nothing',))[0]} here and {other.get(metric, ('nothing',))[0]}"
        for metric in dict.fromkeys([*mine, *other])
        if mine.get(metric) != other.get(metric)
    ]
