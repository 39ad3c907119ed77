"""Refuses results that do not belong into one table: folders that differ in more than the model, or the length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import BenchmarkError

NO_NUMBER_DEPENDS_ON = ("batch_size", "folded", "on_dense")
"""Of the evaluation: how windows go through the model, and further numbers beside the losses."""
OF_A_ROW = ("targets", "seeds")
"""Of a method: which of its rows there are. Tables have those that are there."""
METHOD = "method "
"""What settings of methods begin with: a method that one folder lacks has an empty place in the tables."""
LENGTH = "evaluation.window"
Named = tuple[Path, dict[str, Any]]


def check(found: Sequence[Named], may_differ: Sequence[str]) -> None:
    """Compare what folders say of how they were measured with what the first one says.

    Parameters
    ----------
    found : sequence of (Path, dict)
        Folders with their provenance.json.
    may_differ : sequence of str
        Settings that are not compared, such as `LENGTH`.

    Raises
    ------
    BenchmarkError
        Naming two folders, and the first setting in which they differ with both values.
    """
    (first, facts), *others = found
    mine = dict(_settings(facts))
    for folder, of in others:
        its = dict(_settings(of))
        both = mine.keys() & its.keys()
        shared = both | {name for name in mine.keys() ^ its.keys() if not name.startswith(METHOD)}
        for name in sorted(shared - set(may_differ)):
            a, b = mine.get(name), its.get(name)
            if a != b:
                raise BenchmarkError(
                    f"{first} and {folder} differ in {name} ({_shown(a)} and {_shown(b)}); allowed: results of one "
                    "protocol, on several models or with windows of several lengths"
                )


def _settings(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting that a loss depends on beside the model, by a name that a suite's author knows."""
    suite = facts["suite"]
    for name in ("dtype", "bos", "reference", "weights"):
        yield name, suite.get(name)
    for table in ("tokens", "calibration", "evaluation"):
        for name, value in suite[table].items():
            if not (table == "evaluation" and name in NO_NUMBER_DEPENDS_ON):
                yield f"{table}.{name}", value
    for method in suite["methods"]:
        named = f"{METHOD}{method.get('label') or method['name']}"
        yield from ((f"{named}, {key}", value) for key, value in method.items() if key not in OF_A_ROW)
    for name, sha256 in facts["assets"].items():
        yield f"the data {name}", sha256


def _shown(value: Any) -> str:
    if value is None:
        return "not said"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
