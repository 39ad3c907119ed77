"""Defines jobs (the cells of one method on one model) and the worker that runs them with the weights loaded once."""

from __future__ import annotations

import atexit
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from resting.benchmarks import provenance
from resting.benchmarks.assets import wikitext2
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells import code, run_time
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.identity import cell_key, run_setting
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import ModelError
from resting.benchmarks.names import of_weights
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.measure import measure
from resting.benchmarks.quality.rows import Rows
from resting.benchmarks.sweep.gpus import leased
from resting.benchmarks.sweep.masking_cost import masked_over_dense
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.run_cells import run_cells
from resting.benchmarks.sweep.store import Store
from resting.sparsifier import Compensated, Statistic
from resting.sparsifier.quantised.formats import bits_a_weight


@dataclass(frozen=True)
class Job:
    """Holds cells of one method on one model; it can be sent to another process or machine.

    Attributes
    ----------
    suite : Suite
    options : Options
    source : ModelSource
    missing : mapping of str to str
        Texts and tasks that cannot be had, with the reason.
    label : str
        Of the method.
    cells : tuple of (str, Cell)
        Keys and cells, in the order of the suite.
    needs : set of Statistic
        What the methods of all jobs on this model need.
    mode : Mode
    setting : mapping
        What the keys of all its cells share.
    threads : int
        Number of torch's threads, wherever the job runs: sums depend on it.
    store : Store, optional
        The default one where None.
    """

    suite: Suite
    options: Options
    source: ModelSource
    missing: Mapping[str, str]
    label: str
    cells: tuple[tuple[str, Cell], ...]
    needs: frozenset[Statistic]
    mode: Mode
    setting: Mapping[str, Any]
    threads: int = field(default_factory=torch.get_num_threads)
    store: Store | None = None

    def only_cached(self) -> Job:
        """Return the job with nothing to run: results come from the store where they are there."""
        return replace(self, mode=Mode.ONLY_CACHE)

    def parts(self) -> list[Job]:
        """Return one job per target and seed of a method that is trained over another, else the job as it is.

        Cells of one target and seed share what is trained, under all token policies; others have nothing in common but
        the model. What other methods search, for one target after another, is shared.
        """
        if not isinstance(self.cells[0][1].sparsifier, Compensated):
            return [self]
        by_training = defaultdict(list)
        for key, cell in self.cells:
            by_training[cell.target, cell.seed].append((key, cell))
        return [replace(self, cells=tuple(of_one)) for of_one in by_training.values()]

    def forwards(self) -> float:
        """Estimate its work: tokens in forwards of text, a greedy search with it; decompositions are not known."""
        return sum(run_time.forwards(self.suite, c) + run_time.searched(c.sparsifier) for _, c in self.cells)

    def check_same_code(self) -> None:
        """Refuse the job where its cells would get other keys than they have: code, versions or device differ here.

        Raises
        ------
        CodeChangedError
        """
        setting = run_setting(self.suite, self.source, self.options.device, self.missing)
        code.check_same(setting, self.setting)
        for key, cell in self.cells:
            code.check_same({"code": cell_key(cell, setting)}, {"code": key})

    def is_of_the_same_model(self, other: Job) -> bool:
        """Whether the cells of both are measured on the same loaded model."""
        mine, theirs = ((j.suite, j.source, j.options.device, j.needs) for j in (self, other))
        return mine == theirs


class Worker:
    """Runs jobs one after another; those of one model share weights, statistics and dense passes.

    Parameters
    ----------
    console : Console
        Shows the progress of the present cell.
    on_start : callable, optional
        Is told every cell that is about to be measured, with its job.
    """

    def __init__(self, console: Console, on_start: Callable[[Job, Cell], Any] | None = None) -> None:
        self._console = console
        self._on_start = on_start
        self._last: Job | None = None
        self._loaded: LoadedModel | None = None
        self._masking_is_timed = False
        provenance.checkout()
        if not gc.get_freeze_count():  # a later worker must not freeze the models that are there by then
            gc.freeze()  # else what is imported is looked through again and again, 0.2 s each time
            atexit.register(gc.unfreeze)  # else libraries that count their objects at the end say that they leak

    def results(self, job: Job) -> Iterator[tuple[str, Cell, Result | None, bool]]:
        """Run what is not finished, and yield every cell with its result and whether it was finished before."""
        if job.mode is not Mode.ONLY_CACHE:
            job.check_same_code()
        loaded = self._model_of(job)
        run = partial(self._measure, loaded, job)
        machine = partial(provenance.collect, job.options.device)
        store = job.store or Store.default()
        source = job.source
        named: dict[str, Any] = {
            "suite": job.suite.name,
            "model": source.name,
            "weights": of_weights(source.sha256),
            "weight_format": source.weights,
            "bits_a_weight": bits_a_weight(source.weights),
        }
        for key, cell, result, was_finished in run_cells(job.cells, store, run, job.mode, machine):
            if result is not None and "traceback" in result.info and not result.rows:
                rows = Rows(job.suite, job.source.name, cell)
                rows.nothing(f"{result.status}: {result.info['reason']}")
                result.rows = rows.rows
            if result is not None:  # of the store: another suite may have measured it, under another name
                result.rows = [row | named | {"method": job.label} for row in result.rows]
            yield key, cell, result, was_finished

    def _model_of(self, job: Job) -> LoadedModel:
        """The model of the last job where it serves; a new one loads nothing before it is needed."""
        if self._loaded is None or self._last is None or not job.is_of_the_same_model(self._last):
            on_progress = self._console.stage
            self._loaded = LoadedModel(job.suite, job.source, job.options.device, on_progress, job.needs)
            self._masking_is_timed = False
        self._last = job
        return self._loaded

    def _measure(self, loaded: LoadedModel, job: Job, cell: Cell) -> Result:
        if self._on_start is not None:
            self._on_start(job, cell)
        result = measure(loaded, cell, job.missing)
        code.check_unchanged()
        for row in result.rows:  # for who looks into the store, which knows no model by a cell's key
            row["weights"] = of_weights(job.source.sha256)
        if result.status == "done" and not self._masking_is_timed:
            cost = masked_over_dense(loaded, cell)
            if cost is not None:
                self._masking_is_timed, result.info["masked_over_dense"] = True, cost
        return result


def jobs_of(
    suite: Suite,
    cells: list[Cell],
    options: Options,
    sources: list[ModelSource],
    missing: Mapping[str, str],
    mode: Mode,
) -> list[Job]:
    """Return the jobs of a suite whose cells are `cells`, model by model and method by method."""
    needs = frozenset[Statistic]().union(*(cell.sparsifier.needs for cell in cells))
    jobs = []
    for source in sources:
        setting = run_setting(suite, source, options.device, missing)
        for label in dict.fromkeys(cell.label for cell in cells):
            mine = tuple((cell_key(cell, setting), cell) for cell in cells if cell.label == label)
            jobs.append(Job(suite, options, source, missing, label, mine, needs, mode, setting))
    return jobs


def run_job_and_keep(job: Job) -> list[str] | str:
    """Run a job as `run_job` does, in a process that keeps what it loaded for its next job."""
    if not _kept:
        _kept.append(Worker(Console(quiet=True)))
    return run_job(job, _kept[0])


_kept: list[Worker] = []
"""The worker of this process, where it has one that stays."""


def run_job(job: Job, worker: Worker | None = None) -> list[str] | str:
    """Run a job in this process, with nothing on the screen: the work of an executor's worker.

    Returns
    -------
    list of str, or str
        Keys of its cells; results are in the store. The reason alone where its model is refused: executors do not
        bring an error back as it was raised.
    """
    torch.set_num_threads(job.threads)
    wikitext2.provide({name: file for name, file in job.options.texts.items() if name == "wikitext2"})
    with leased(job.options.device) as device:
        mine = replace(job, options=replace(job.options, device=device))
        try:
            return [key for key, *_ in (worker or Worker(Console(quiet=True))).results(mine)]
        except ModelError as error:
            return str(error)
