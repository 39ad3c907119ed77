"""Runs a suite: its cells or its times, then its results folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from resting.benchmarks.assets import models
from resting.benchmarks.cells import own_texts
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import FailedCells, ModelError, first_line
from resting.benchmarks.events import Events, OnEvent
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.names import bare, of_weights, slug
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import bos, fits
from resting.benchmarks.quality.weight_formats import in_formats
from resting.benchmarks.report import folder as results
from resting.benchmarks.report import readme
from resting.benchmarks.sweep import output
from resting.benchmarks.sweep.available import check_lengths, missing
from resting.benchmarks.sweep.execution import SERIAL, Execution
from resting.benchmarks.sweep.jobs import Job, Worker, jobs_of
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.run_cells import failures, has_number, why
from resting.benchmarks.sweep.sources import told_apart
from resting.benchmarks.sweep.store import Store

Tried = tuple[models.ModelSource, Cell, Result | None]


def run(
    suite: Suite,
    options: Options,
    console: Console | None = None,
    execution: Execution = SERIAL,
    on_event: OnEvent | None = None,
) -> Path:
    """Run `suite` and write its results folder.

    Parameters
    ----------
    suite : Suite
    options : Options
    console : Console, optional
        Shows a person how the run goes; nothing is shown where None.
    execution : Execution
    on_event : callable, optional
        Is called with every event of the run, a mapping: ``time``, ``event``, ``suite``, ``cell``, ``done``, ``total``,
        and the ``metrics`` of a cell that is finished (docs/logging.md).

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    AssetError
        If the model, or the calibration text, cannot be had.
    SuiteError
        If `execution` asks of a suite of times what is for cells.
    FailedCells
        If all cells were tried, and some have no result; the folder has the others.
    """
    execution.check(suite)
    console = console or Console(quiet=True)
    events = Events(on_event, console.say)
    try:
        if suite.latency is not None:
            events.tell("run-started", suite=suite.name, done=0, total=None)
            folder = _time(suite, options, console)
        else:
            folder = _measure(suite, options, console, execution, events)
    except FailedCells as error:
        events.tell("run-finished", suite=suite.name, reason=str(error))
        raise
    except BaseException as error:
        events.tell("run-stopped", suite=suite.name, reason=first_line(error))
        raise
    events.tell("run-finished", suite=suite.name, folder=str(folder))
    return folder


def _measure(suite: Suite, options: Options, console: Console, execution: Execution, events: Events) -> Path:
    """Run the cells of `suite`, and write what they measured."""
    if options.dtype:
        suite = suite.model_copy(update={"dtype": options.dtype})
    cells = cells_of(suite, options.methods)
    suite = own_texts.resolved(suite, options.texts)
    names = [options.model] if options.model else suite.models
    sources = told_apart([models.resolve(name, console.say, console.stage, trusted=options.trusted) for name in names])
    sources = in_formats(sources, suite.weights)
    for source in sources:
        fits.check(suite, source)
        if warning := bos.check(source, suite.bos):
            console.say(warning)
        check_lengths(suite, source)
    # Named after the suite, with what the command line put in place of the suite's own.
    replaced = (slug(bare(sources[0].name)) if options.model else None, options.dtype)
    folder = options.output / "-".join(part for part in (suite.name, *replaced) if part)
    for place in (folder, _partial(folder)):
        output.check(
            place, suite.name, {of_weights(one.sha256): one.name for one in sources}, suite.dtype, suite.changed
        )
    logging.disable_progress_bar()  # from here on the progress shown is the suite's
    jobs = jobs_of(suite, cells, options, sources, missing(suite, console), execution.mode)
    events.tell("run-started", suite=suite.name, done=0, total=sum(len(job.cells) for job in jobs))
    tried: list[Tried] = []
    refused: dict[models.ModelSource, str] = {}
    fresh: set[str] = set()  # keys of cells that an executor measures now, taken from the store after it
    try:
        if execution.executor is not ExecutorName.SERIAL:
            store = Store.default()
            fresh = {key for job in jobs for key, _ in job.cells if store.finished(key) is None}

            def tell(job: Job, done: int, of: int) -> None:
                events.tell(
                    "job-finished", suite=suite.name, model=job.source.name, method=job.label, done=done, total=of
                )

            refused |= execution.distribute(jobs, console, tell)
            execution, jobs = replace(execution, shard=None), [job.only_cached() for job in jobs]
        for one in _tried(jobs, execution, console, refused, events, fresh):
            tried.append(one)  # one by one: what an interruption leaves is written
    except BaseException:
        _write_partial(suite, sources, tried, folder, console)
        raise
    console.end()
    if len(refused) == len(sources):
        raise ModelError("; ".join(refused.values()))
    return _finish(suite, [one for one in sources if one not in refused], tried, refused, folder, execution, console)


def _time(suite: Suite, options: Options, console: Console) -> Path:
    """Time what `suite` names, and report it: after an interruption the tables of what was timed until then."""
    timed = LatencyRun(suite, options, console)
    output.check_writable(timed.record.folder)
    done = False
    try:
        folder = timed.run()
        done = True
    finally:
        if timed.record.has_rows:
            readme.write(timed.record.folder, plots=done)
            if not done:
                console.say(f"stopped: {timed.record.folder} has what was timed; the same command times all again")
    return folder


def _tried(
    jobs: list[Job],
    execution: Execution,
    console: Console,
    refused: dict[models.ModelSource, str],
    events: Events,
    fresh: set[str],
) -> Iterator[Tried]:
    """Yield every cell with its result, from the store where it was measured before.

    A model that turns out not to be supported goes into `refused`, and the others are measured.
    """
    done, total = 0, sum(len(job.cells) for job in jobs)

    def tell(event: str, job: Job, cell: Cell, **facts: Any) -> None:
        events.tell(event, suite=job.suite.name, cell=_named(job, cell), done=done, total=total, **facts)

    worker = Worker(console, lambda job, cell: tell("cell-started", job, cell))
    for number, job in enumerate(jobs):
        if job.source in refused:
            done += len(job.cells)
            continue
        here = job if execution.takes(number) else job.only_cached()
        console.begin(done, total, job.label)
        results = worker.results(here)
        while True:
            try:
                key, cell, result, was_finished = next(results)
            except StopIteration:
                break
            except ModelError as error:
                refused[job.source] = str(error)
                events.tell("model-refused", suite=job.suite.name, model=job.source.name, reason=str(error))
                break
            done += 1
            console.begin(done, total, job.label)
            if result is not None:
                console.finished(result.rows, cached=was_finished)
                if "traceback" in result.info:
                    console.say(f"{cell.label} at {cell.target:g}: {result.status}, {result.info['reason']}")
            tell("cell-finished", job, cell, **_outcome(result, was_finished and key not in fresh))
            yield job.source, cell, result


def _named(job: Job, cell: Cell) -> dict[str, Any]:
    return {
        "model": job.source.name,
        "method": cell.label,
        "target": cell.target,
        "seed": cell.seed,
        "tokens": str(cell.policy),
    }


def _outcome(result: Result | None, was_finished: bool) -> dict[str, Any]:
    """What an event says of a cell that is finished; a number that there is none of has a reason."""
    if result is None:
        return {"status": "missing", "cached": False, "metrics": {}}
    metrics = {row["metric"]: row["value"] for row in result.rows if row["value"] is not None}
    shares = [row["byte_sparsity"] for row in result.rows if row["byte_sparsity"] is not None]
    reasons = {row["metric"]: row["reason"] for row in result.rows if row["reason"]}
    return {
        "status": result.status,
        "cached": was_finished,
        "seconds": round(result.seconds, 3),
        "byte_sparsity": shares[0] if shares else None,
        "metrics": metrics,
        "reasons": reasons,
    }


def _write_partial(
    suite: Suite, sources: list[models.ModelSource], tried: list[Tried], folder: Path, console: Console
) -> None:
    """Write the numbers of an interrupted run beside the folder that it would have written.

    Tables and plots take their time, and who stops a run does not wait for them.
    """
    console.end()
    if have := _with_results(tried):
        partial = _partial(folder)
        results.write(partial, suite, sources, have)
        console.say(
            f"stopped after {len(have)} cells: the same command goes on from here; {partial} has their numbers, and "
            f"`resting report {partial.name}` makes tables of them"
        )


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _finish(
    suite: Suite,
    sources: list[models.ModelSource],
    tried: list[Tried],
    refused: dict[models.ModelSource, str],
    folder: Path,
    execution: Execution,
    console: Console,
) -> Path:
    tried = [one for one in tried if one[0] not in refused]
    lost = failures((f"{source.name}: {cell.label} at {cell.target:g}", result) for source, cell, result in tried)
    if execution.shard is not None and lost:
        console.say(f"{len(tried) - len(lost)} of {len(tried)} cells are in the store of this part")
        return folder
    said = _complaints(tried, lost, refused, execution)
    try:
        _write(folder, suite, sources, _with_results(tried))
    except BaseException:
        if said:  # what went wrong before the report did
            console.say(said)
        raise
    shutil.rmtree(_partial(folder), ignore_errors=True)
    if said:
        raise FailedCells(said)
    if diverged := sum(result is not None and result.status == "diverged" for _, _, result in tried):
        console.say(f"{diverged} of {len(tried)} cells diverged: what is not finite has its reason in the tables")
    return folder


def _complaints(
    tried: list[Tried], lost: list[str], refused: dict[models.ModelSource, str], execution: Execution
) -> str:
    """Say why a run is not whole: models that were refused, cells without a result, no number at all."""
    said = [f"{source.name} was left out: {reason}" for source, reason in refused.items()]
    again = "--mode only-missing" if execution.mode is Mode.ONLY_CACHE else "the same command"
    if tried and not any(has_number(result) for _, _, result in tried):
        reasons = dict.fromkeys(why(result) for _, _, result in tried)
        listed = "\n  ".join(reasons)
        more = f", {again} tries {len(lost)} of them again" if lost else ""
        said.append(f"none of {len(tried)} cells has a number{more}:\n  {listed}")
    elif lost:
        listed = "\n  ".join(lost)
        said.append(f"{len(lost)} of {len(tried)} cells have no result, {again} tries them again:\n  {listed}")
    return "\n".join(said)


def _write(folder: Path, suite: Suite, sources: list[models.ModelSource], found: list[results.Measured]) -> None:
    """Write what was measured, and its report where there is a row to show."""
    results.write(folder, suite, sources, found)
    if any(result.rows for _, _, result in found):
        readme.write(folder)


def _with_results(tried: list[Tried]) -> list[results.Measured]:
    return [(source, cell, result) for source, cell, result in tried if result is not None]
