"""Runs a suite: its cells or its times, then its results folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from resting.benchmarks.assets import models, wikitext2
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import FailedCells
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.names import short, slug
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import bos
from resting.benchmarks.report import folder as results
from resting.benchmarks.report import readme
from resting.benchmarks.sweep.available import missing
from resting.benchmarks.sweep.execution import SERIAL, Execution
from resting.benchmarks.sweep.jobs import Job, Worker, jobs_of
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.run_cells import failures

Tried = tuple[models.ModelSource, Cell, Result | None]


def run(suite: Suite, options: Options, console: Console, execution: Execution = SERIAL) -> Path:
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
    if suite.latency is not None:
        return _time(suite, options, console)
    if options.dtype:
        suite = suite.model_copy(update={"dtype": options.dtype})
    cells = cells_of(suite, options.methods)
    wikitext2.provide(options.texts)
    names = [options.model] if options.model else suite.models
    sources = [models.resolve(name, console.say, console.stage, trusted=options.trusted) for name in names]
    for warning in (bos.check(source, suite.bos) for source in sources):
        if warning:
            console.say(warning)
    # Named after the suite, with what the command line put in place of the suite's own.
    replaced = (slug(short(sources[0].name)) if options.model else None, options.dtype)
    folder = options.output / "-".join(part for part in (suite.name, *replaced) if part)
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    jobs = jobs_of(suite, cells, options, sources, missing(suite, console), execution.mode)
    tried: list[Tried] = []
    try:
        if execution.executor is not ExecutorName.SERIAL:
            execution.distribute(jobs, console)
            execution, jobs = replace(execution, shard=None), [job.only_cached() for job in jobs]
        for one in _tried(jobs, execution, console):
            tried.append(one)  # one by one: what an interruption leaves is written
    except BaseException:
        _write_partial(suite, sources, tried, folder, console)
        raise
    console.end()
    return _finish(suite, sources, tried, folder, execution, console)


def _time(suite: Suite, options: Options, console: Console) -> Path:
    """Time what `suite` names, and report it: after an interruption what was timed until then."""
    timed = LatencyRun(suite, options, console)
    try:
        return timed.run()
    finally:
        if timed.record.has_rows:
            readme.write(timed.record.folder)


def _tried(jobs: list[Job], execution: Execution, console: Console) -> Iterator[Tried]:
    """Yield every cell with its result, from the store where it was measured before."""
    worker, done, total = Worker(console), 0, sum(len(job.cells) for job in jobs)
    for number, job in enumerate(jobs):
        here = job if execution.takes(number) else job.only_cached()
        named = {"suite": job.suite.name, "method": job.label, "model": job.source.name}
        console.begin(done, total, job.label)
        for _, cell, result, was_finished in worker.results(here):
            done += 1
            console.begin(done, total, job.label)
            if result is not None:
                result.rows = [row | named for row in result.rows]
                console.finished(result.rows, cached=was_finished)
                if "traceback" in result.info:
                    console.say(f"{cell.label} at {cell.target:g}: {result.status}, {result.info['reason']}")
            yield job.source, cell, result


def _write_partial(
    suite: Suite, sources: list[models.ModelSource], tried: list[Tried], folder: Path, console: Console
) -> None:
    """Write what an interrupted run has measured beside the folder that it would have written."""
    if have := _with_results(tried):
        console.end()
        partial = folder.with_name(f"{folder.name}.partial")
        _write(partial, suite, sources, have)
        console.say(f"stopped after {len(have)} cells: {partial} has them; the same command goes on from here")


def _finish(
    suite: Suite,
    sources: list[models.ModelSource],
    tried: list[Tried],
    folder: Path,
    execution: Execution,
    console: Console,
) -> Path:
    lost = failures((f"{source.name}: {cell.label} at {cell.target:g}", result) for source, cell, result in tried)
    if execution.shard is not None and lost:
        console.say(f"{len(tried) - len(lost)} of {len(tried)} cells are in the store of this part")
        return folder
    _write(folder, suite, sources, _with_results(tried))
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    if lost:
        again = "--mode only-missing" if execution.mode is Mode.ONLY_CACHE else "the same command"
        listed = "\n  ".join(lost)
        raise FailedCells(f"{len(lost)} of {len(tried)} cells have no result, {again} tries them again:\n  {listed}")
    return folder


def _write(folder: Path, suite: Suite, sources: list[models.ModelSource], found: list[results.Measured]) -> None:
    """Write what was measured, and its report where there is a row to show."""
    results.write(folder, suite, sources, found)
    if any(result.rows for _, _, result in found):
        readme.write(folder)


def _with_results(tried: list[Tried]) -> list[results.Measured]:
    return [(source, cell, result) for source, cell, result in tried if result is not None]
