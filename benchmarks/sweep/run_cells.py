"""Runs cells one after another: what is finished is never run again, and what fails stops nothing."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from resting.benchmarks.cells.cell import Result
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.store import FINISHED, NO_SPACE, Store, full_disk_named

Item = TypeVar("Item")


def run_cells(
    cells: Iterable[tuple[str, Item]],
    store: Store,
    measure: Callable[[Item], Result],
    mode: Mode = Mode.ONLY_MISSING,
    machine: Callable[[], dict[str, Any]] = dict,
) -> Iterator[tuple[str, Item, Result | None, bool]]:
    """Run what is not finished, in order; cells that another process runs at the time come last.

    Parameters
    ----------
    cells : iterable of (str, object)
        Keys, and what `measure` takes.
    store : Store
    measure : callable
        Gives the result of a cell. An exception makes it a failed one.
    mode : Mode
    machine : callable
        Facts about where this runs, kept with every result.

    Yields
    ------
    key, item, result, was_finished
        The result is None only with `Mode.ONLY_CACHE`.

    Raises
    ------
    StoreError
        If the store cannot be written: the sweep cannot go on.
    """
    elsewhere: list[tuple[str, Item]] = []
    for key, item in cells:
        if mode is Mode.ONLY_CACHE:
            yield key, item, store.load(key), True
            continue
        known = store.finished(key) if mode is not Mode.FORCE else None
        if known is not None:
            yield key, item, known, True
            continue
        with store.claimed(key) as mine:
            found = _claimed(key, item, store, measure, mode, machine) if mine else None
        if found is None:
            elsewhere.append((key, item))
        else:
            yield key, item, *found
    for key, item in elsewhere:
        with store.claimed(key, wait=True):
            found = _claimed(key, item, store, measure, Mode.ONLY_MISSING, machine)
        yield key, item, *found


def _claimed(
    key: str,
    item: Item,
    store: Store,
    measure: Callable[[Item], Result],
    mode: Mode,
    machine: Callable[[], dict[str, Any]],
) -> tuple[Result, bool]:
    """Measure the cell, unless another process had it ready when the claim was granted."""
    known = store.finished(key) if mode is not Mode.FORCE else None
    if known is not None:
        return known, True
    with full_disk_named(store.folder):
        result = attempt(measure, item)
    result.measured_on = machine()
    store.save(key, result)
    return result, False


def attempt(measure: Callable[[Any], Result], item: Any) -> Result:
    """Return the result of a measurement, or of its failure.

    A full disk and an interruption are not the cell's fault, and are raised.
    """
    result = _measured(measure, item)
    if "traceback" in result.info:
        let_go()
    for row in result.rows:
        if row.get("value") is not None and not math.isfinite(row["value"]):
            row["reason"], row["value"] = f"diverged: the value is {row['value']}", None
            result.status = "diverged" if result.status == "done" else result.status
    return result


def _measured(measure: Callable[[Any], Result], item: Any) -> Result:
    try:
        return measure(item)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Result("out-of-memory", info={"reason": _sentence(error), "traceback": traceback.format_exc()})
    except BenchmarkError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        return Result("failed", info={"reason": _sentence(error), "traceback": traceback.format_exc()})


def let_go() -> None:
    """Give back what a failed measurement held: a model over several GPUs refers to itself."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # an error of a GPU that stays is raised again, whatever is asked of it
            torch.cuda.empty_cache()


def _sentence(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def failures(results: Iterable[tuple[str, Result | None]]) -> list[str]:
    """Return a line for each cell, by its name, that has no result."""
    return [f"{name}: {why(result)}" for name, result in results if has_failed(result)]


def has_failed(result: Result | None) -> bool:
    """Whether a cell has no result, and the next run tries it again."""
    return result is None or result.status not in (*FINISHED, "missing")


def has_number(result: Result | None) -> bool:
    """Whether anything was measured."""
    return result is not None and any(row.get("value") is not None for row in result.rows)


def why(result: Result | None) -> str:
    """Say why a cell has no number."""
    if result is None:
        return "not in the store"
    if has_failed(result):
        return f"{result.status}, {result.info.get('reason', 'no reason kept')}"
    return next((f"{result.status}, {row['reason']}" for row in result.rows if row.get("reason")), result.status)
